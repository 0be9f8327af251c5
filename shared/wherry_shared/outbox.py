"""The relay of a service's outbox: what its transactions said happened, published until the stream has it.

Events leave in the order of their transactions; one is removed only after the stream's ack, and carries its id as
`Nats-Msg-Id`, so none is lost and none is stored twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from datetime import datetime
from typing import Any

from .api.events import Envelope
from .bus import Bus, events, subjects
from .errors import WherryError
from .sqlite import Database, Transaction

log = logging.getLogger("wherry.outbox")

BATCH = 128
# From so many on one batch, synced once, is quicker than one after the other: it takes some 6 ms whatever its size.
TOGETHER = 10
PAUSE_FIRST, PAUSE_LAST = 0.05, 2.0


class Outbox:
    """Relays one database's outbox to the bus."""

    def __init__(self, database: Database, bus: Bus) -> None:
        self._database = database
        self._bus = bus
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._sent = 0

    def start(self) -> None:
        """Begin with what an earlier process left."""
        self._database.on_events = self._wake.set
        self._wake.set()
        self._task = asyncio.get_running_loop().create_task(self._relay())

    async def stop(self, patience: float = 2.0) -> None:
        """Send what is left, for `patience` seconds; the rest stays in the outbox for the next start."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None
        with contextlib.suppress(WherryError, TimeoutError):
            async with asyncio.timeout(patience):
                while await self._send_batch():
                    pass

    async def _relay(self) -> None:
        pause = PAUSE_FIRST
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while await self._send_batch():
                    pause = PAUSE_FIRST
                continue
            except WherryError as e:
                log.info("events wait in the outbox: %s", e)
            except Exception:  # whatever it is, the events must leave some day
                log.exception("events wait in the outbox")
            await asyncio.sleep(pause)
            pause = min(pause * 2, PAUSE_LAST)
            self._wake.set()

    async def _send_batch(self) -> int:
        """Publish the oldest events, forget those that the stream has. Raises when one was not taken."""
        rows = self._database.all(
            "SELECT seq, id, namespace, topic, at, event FROM outbox WHERE seq > ? ORDER BY seq LIMIT ?",
            (self._sent, BATCH),
        )
        if len(rows) >= TOGETHER and await events.publish_together(
            self._bus.transport, [self._outgoing(row) for row in rows]
        ):
            await self._forget(rows[-1][0])
            return len(rows)
        taken = 0
        try:
            for row in rows:  # a second one never before the first, also when the stream begins to take them meanwhile
                await events.publish(self._bus.transport, self._outgoing(row))
                taken = row[0]
        finally:
            if taken:
                await self._forget(taken)
        return len(rows)

    def _outgoing(self, row: Any) -> events.Outgoing:
        _, event_id, namespace, topic, at, event = row
        envelope = Envelope(
            id=event_id, timestamp=datetime.fromisoformat(at), namespace=namespace, topic=topic, node=self._bus.node,
            event=json.loads(event),
        )  # fmt: skip
        return events.Outgoing(subjects.event(self._bus.node, namespace, topic), events.encode(envelope), event_id)

    async def _forget(self, upto: int) -> None:
        self._sent = upto

        def forget(tx: Transaction) -> None:
            tx.execute("DELETE FROM outbox WHERE seq <= ?", (upto,))

        await self._database.write(forget, frees=True)
