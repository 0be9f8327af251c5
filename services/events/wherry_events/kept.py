"""What callers published and the stream acknowledged a moment ago, kept until the stream's files surely have it.

Services keep their own events in their outboxes (wherry_shared.outbox); callers have none, so this is theirs.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

from wherry_shared.boot import boot_id
from wherry_shared.bus import events
from wherry_shared.bus.transport import EventLog, Transport
from wherry_shared.errors import WherryError
from wherry_shared.outbox import Recent
from wherry_shared.values import now

from .metadata import Rows

# The stream's times are nats-server's, ours this process's.
_CLOCK = timedelta(seconds=60)


class Kept:
    """Keeps events over a power cut that the stream may not survive whole."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._boot = boot_id()
        self._recent = Recent()
        self._waiting: list[tuple[events.Outgoing, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def restore(self, log: EventLog, transport: Transport) -> None:
        """Give the stream again what a power cut took from it. Unavailable when it takes it not."""
        rows = self._rows.of_others(self._boot)
        if not rows:
            return
        there = await _stored_since(log, min(datetime.fromisoformat(row.at) for row in rows) - _CLOCK)
        for row in rows:
            if row.event.id not in there:
                await events.publish(transport, row.event)
        await self._rows.adopt(self._boot, rows[-1].seq)

    def keep(self, event: events.Outgoing, kept: asyncio.Future[None]) -> None:
        """Durably keep what the stream has acknowledged, and tell; what comes meanwhile is written together."""
        self._waiting.append((event, kept))
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                error = await self._add([event for event, _ in batch])
                for _, kept in batch:
                    if kept.done():
                        continue
                    if error is None:
                        kept.set_result(None)
                    else:
                        kept.set_exception(type(error)(error.message))
        finally:
            self._writing = None

    async def _add(self, batch: list[events.Outgoing]) -> WherryError | None:
        try:
            await self._rows.add(batch, now().isoformat(), self._boot, self._recent.note)
        except WherryError as e:
            return e
        return None


async def _stored_since(log: EventLog, since: datetime) -> set[str]:
    """The ids of the stream's events since a time."""
    found: set[str] = set()
    stored = await log.read(since=since, limit=1000)
    while stored:
        found.update(envelope.id for entry in stored if (envelope := events.decode(entry.data)) is not None)
        stored = await log.read(after=stored[-1].sequence, limit=1000)
    return found
