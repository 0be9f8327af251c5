"""What callers published a moment ago, kept until the stream's files surely have it.

Of many, the next are written while the stream takes them. What it refuses is gone from here before its caller knows.

Services keep their own events in their outboxes (wherry_shared.outbox); callers have none, so this is theirs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from datetime import datetime, timedelta
from typing import Any

from wherry_shared.boot import boot_id
from wherry_shared.bus import events
from wherry_shared.bus.transport import EventLog, Transport
from wherry_shared.errors import WherryError
from wherry_shared.outbox import Recent
from wherry_shared.values import now

from .metadata import Rows

log = logging.getLogger(__name__)

# Between two deletions of what is kept no longer: a few rows cost as many pages as many do.
FORGET_SECONDS = 1.0
# The stream's times are nats-server's, ours this process's.
_CLOCK = timedelta(seconds=60)


class Entry:
    """An event on its way into the stream, and among what is kept. Implements transport.Answer."""

    __slots__ = ("_has", "_kept", "_told", "event", "is_told", "on_told", "refused")

    def __init__(self, event: events.Outgoing, has: Callable[[int, bytes], None]) -> None:
        """has: told the number that the stream gave it, and its body."""
        self.event = event
        self.is_told = False  # by the stream
        self.refused: WherryError | None = None
        self.on_told: Callable[[], None] | None = None
        self._has = has
        self._told: asyncio.Future[None] | None = None
        self._kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __await__(self) -> Generator[Any, None, None]:
        """Until the stream has it and it is kept."""
        return self._kept.__await__()

    def end(self, error: WherryError | None) -> None:
        """Both are done, or one of them is not."""
        error = self.refused or error
        if self._kept.done():
            return
        if error is None:
            self._kept.set_result(None)
        else:
            self._kept.set_exception(type(error)(error.message))

    async def told(self) -> None:
        """Until the stream has said something, or its time is over."""
        self._told = asyncio.get_running_loop().create_future()
        await self._told

    # ---- transport.Answer

    def done(self) -> bool:
        return False  # what its caller waits for no more is kept all the same

    def set_result(self, ack: Any, /) -> None:
        try:
            self._has(events.number_of(ack), self.event.data)
        except WherryError as e:
            self.refused = e
        self._tell()

    def set_exception(self, error: WherryError, /) -> None:
        self.refused = events.why_not(error)
        self._tell()

    def _tell(self) -> None:
        self.is_told = True
        if self._told is not None and not self._told.done():
            self._told.set_result(None)
        if self.on_told is not None:
            self.on_told()


class Kept:
    """Keeps events over a power cut that the stream may not survive whole."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._boot = boot_id()
        self._recent = Recent()
        self._told = self._synced = 0  # up to where the stream has said its word, and where its files surely have them
        self._forgot_at = 0.0
        self._waiting: list[Entry] = []
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

    def keep(self, entry: Entry) -> None:
        """Keep an event that was just sent to the stream, together with what comes meanwhile.

        Of many, the next are written while the stream takes them; a single one when it has it: its subscribers have
        the processors till then.
        """
        self._waiting.append(entry)
        entry.on_told = self._begin
        if entry.is_told:  # at once: nobody listens, say
            self._begin()

    def _begin(self) -> None:
        if self._writing is None and self._waiting:
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                batch = [entry for entry in waiting if entry.refused is None]
                last, error = await self._add(batch) if batch else (0, None)
                for entry in batch:
                    if not entry.is_told:  # later ones are told later: nobody waits for longer
                        await entry.told()
                if last:
                    await self._sort_out(batch, last)
                for entry in waiting:
                    entry.end(error)
        finally:
            self._writing = None

    async def _add(self, batch: list[Entry]) -> tuple[int, WherryError | None]:
        """The last one's number, or why there is none."""
        try:
            return await self._rows.add([e.event for e in batch], now().isoformat(), self._boot, self._due()), None
        except WherryError as e:
            return 0, e

    async def _sort_out(self, batch: list[Entry], last: int) -> None:
        """Forget at once what the stream refused, before its caller knows; the rest when its files surely have it."""
        first = last - len(batch) + 1
        refused = [first + place for place, entry in enumerate(batch) if entry.refused is not None]
        try:
            if refused:
                await self._rows.remove(refused)
        except WherryError as e:
            log.warning("after a power cut the stream would be given what it has refused: %s", e)
        self._told, self._synced = last, max(self._synced, self._recent.note(last))

    def _due(self) -> int:
        """Up to where to forget now, if it is time to."""
        time = asyncio.get_running_loop().time()
        if time - self._forgot_at < FORGET_SECONDS:
            return 0
        self._forgot_at = time
        self._synced = max(self._synced, self._recent.note(self._told))
        return self._synced


async def _stored_since(log: EventLog, since: datetime) -> set[str]:
    """The ids of the stream's events since a time."""
    found: set[str] = set()
    stored = await log.read(since=since, limit=1000)
    while stored:
        found.update(envelope.id for entry in stored if (envelope := events.decode(entry.data)) is not None)
        stored = await log.read(after=stored[-1].sequence, limit=1000)
    return found
