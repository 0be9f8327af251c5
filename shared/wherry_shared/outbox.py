"""The relay of a service's outbox: what its transactions said happened, published until the stream has it.

Events leave in the order of their transactions; one is removed only after the stream's ack, and carries its id as
`Nats-Msg-Id`, so none is lost and none is stored twice. The stream's own files are synced once a second: so long, and
some seconds more, what it has acknowledged is kept in `sent`, and goes again if the power was cut meanwhile
(docs/decisions/0025).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from .api.events import Events
from .boot import boot_id
from .bus import Bus, events, stream, subjects
from .errors import OutOfRange, WherryError
from .sqlite import Database, Transaction
from .values import now

log = logging.getLogger("wherry.outbox")

BATCH = 128
# Where so many left together, the next ones wait until more have come: a batch costs the bus, its readers and us about
# the same whatever is in it. One that comes alone, or the first of a crowd, leaves at once.
CROWD, GATHER = 4, 0.005
# Turns of the event loop in which whoever wrote an event gets its answer out first, some tasks away from the write: the
# relay would take the loop, its thread and the disk from it.
TURNS = 3
# A moment for more to come: then all that was sent is put aside in one write, or when it is so much.
LINGER, ASIDE_MAX = 0.05, 1024
PAUSE_FIRST, PAUSE_LAST = 0.05, 2.0
# Ten times what nats-server is told (`sync_interval`): a disk may be slow.
KEEP_SECONDS = 10.0
# An event may be in the stream when its ack got lost; so long the stream knows it by its id, surely.
KNOWN_SECONDS = stream.DUPLICATE_WINDOW_SECONDS / 2
# The stream's times are the server's, an event's own is that of its transaction.
_CLOCK = timedelta(seconds=60)
_ANY = (1 << 63) - 1
_COLUMNS = "seq, id, namespace, topic, at, event"


class Recent:
    """Growing numbers of what the stream has acknowledged, and which of them are surely on its disk."""

    def __init__(self) -> None:
        self._noted: deque[tuple[float, int]] = deque()

    def note(self, number: int) -> int:
        """All up to `number` are acknowledged now. Answers up to where they are on its disk; 0 for none."""
        at, synced = time.monotonic(), 0
        self._noted.append((at, number))
        while self._noted[0][0] < at - KEEP_SECONDS:
            synced = self._noted.popleft()[1]
        return synced


class Outbox:
    """Relays one database's outbox to the bus. shared: other processes relay it, too."""

    def __init__(self, database: Database, bus: Bus, *, shared: bool = False) -> None:
        self._database = database
        # What lies in a shared outbox, another would send again; and who wrote it, another may know.
        self._linger, self._gather = (0.0, 0.0) if shared else (LINGER, GATHER)
        self._shared = shared
        self._bus = bus
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[None] | None = None
        self._sent = self._aside = 0
        self._boot = boot_id()
        self._recent = Recent()
        self._unsure: int | None = None  # up to here, rows may have been sent before; None: look
        self._flows = False  # whether the stream took all of the last batch, on this connection

    def start(self) -> None:
        """Begin with what an earlier process left."""
        self._database.on_events = self._wake.set
        self._bus.transport.on_state.append(self._on_state)
        self._wake.set()
        self._task = asyncio.get_running_loop().create_task(self._relay())

    async def stop(self, patience: float = 2.0) -> None:
        """Send what is left, for `patience` seconds; the rest stays in the outbox for the next start."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None
        self._bus.transport.on_state.remove(self._on_state)
        with contextlib.suppress(WherryError, TimeoutError):
            async with asyncio.timeout(patience):
                while await self._send_batch():
                    pass
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.wait([self._moving])
        with contextlib.suppress(WherryError):
            await self._put_aside()

    def _on_state(self, connected: bool) -> None:
        self._flows = False
        if connected:
            self._wake.set()

    async def _relay(self) -> None:
        pause = PAUSE_FIRST
        while True:
            try:
                if not await self._woken():
                    self._put_aside_beside()
                    continue
                for _ in range(TURNS):
                    await asyncio.sleep(0)
                while sent := await self._send_batch():
                    pause = PAUSE_FIRST
                    if CROWD <= sent < BATCH and self._gather:
                        await asyncio.sleep(self._gather)
                continue
            except WherryError as e:
                log.info("events wait in the outbox: %s", e)
            except Exception:  # whatever it is, the events must leave some day
                log.exception("events wait in the outbox")
            await asyncio.sleep(pause)
            pause = min(pause * 2, PAUSE_LAST)
            self._wake.set()

    async def _woken(self) -> bool:
        """Return True when there is something to send, False when there was nothing for a moment after the last."""
        if not self._wake.is_set():
            moving = self._moving is not None and not self._moving.done()
            moment = LINGER if moving else self._linger
            try:
                async with asyncio.timeout(moment if self._aside < self._sent else None):
                    await self._wake.wait()
            except TimeoutError:
                return False
        self._wake.clear()
        return True

    async def _send_batch(self) -> int:
        """Publish the oldest events. Raises when one was not taken."""
        if self._unsure is None:
            self._unsure = await self._begin()
        if self._sent - self._aside >= ASIDE_MAX:
            self._put_aside_beside()
        rows = self._database.all(
            f"SELECT {_COLUMNS} FROM outbox WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?",  # noqa: S608 - our own words
            (self._sent, _ANY if self._shared else self._database.events_known, BATCH),
        )
        if not rows:
            return 0
        await self._database.settle()
        absent = await self._absent(rows) if rows[0][0] <= self._unsure else rows
        self._unsure = max(self._unsure, rows[-1][0])
        taken, error = await self._publish(absent)
        # What the stream had already counts as taken, up to the first that it did not take.
        self._sent = max(self._sent, rows[-1][0] if taken == len(absent) else absent[taken][0] - 1)
        if error is not None:
            raise error
        return len(rows)

    async def _begin(self) -> int:
        """Take back what a power cut may have taken from the stream. Answers up to where rows may be there already."""

        def take_back(tx: Transaction) -> int:
            lost = (self._boot,)
            back = tx.one("SELECT max(seq) FROM sent WHERE boot != ?", lost)[0] or 0
            tx.execute(f"INSERT OR IGNORE INTO outbox ({_COLUMNS}) SELECT {_COLUMNS} FROM sent WHERE boot != ?", lost)  # noqa: S608
            tx.execute("DELETE FROM sent WHERE boot != ?", lost)
            self._recent.note(tx.one("SELECT max(seq) FROM sent")[0] or 0)
            # Of the rest, any: acks got lost with the process before, or it had not put aside what was sent.
            return int(tx.one("SELECT max(seq) FROM outbox")[0] or back)

        return await self._database.write(take_back, frees=True)

    async def _absent(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Those of the rows that are not in the stream for sure, where it does not know them by their ids any more."""
        oldest = min(datetime.fromisoformat(row[4]) for row in rows)
        if now() - oldest < timedelta(seconds=KNOWN_SECONDS):
            return rows
        there = await self._stored_since(oldest - _CLOCK)
        absent = [row for row in rows if row[1] not in there]
        if len(absent) == BATCH:  # sent in their order, a batch at a time: behind a whole one that is missing, all are
            self._unsure = 0
        return absent

    async def _stored_since(self, since: datetime) -> set[str]:
        """The ids of the stream's events. Unavailable when the events service is."""
        source, found, token = self._bus.proxy(Events), set[str](), ""
        while True:
            try:
                window = await source.replay(since=None if token else since, token=token, limit=1000)
            except OutOfRange:  # it goes away from its beginning while it is read
                token = ""
                continue
            found.update(envelope.id for envelope in window.events)
            token = window.token
            if not window.more:
                return found

    async def _publish(self, rows: Sequence[Any]) -> tuple[int, WherryError | None]:
        """How many of the rows, from the first, the stream took; and why not the next one.

        All at once only where the stream took the last ones: else it might begin to take them in the middle.
        """
        taken, error = await self._hand_over(rows if self._flows else rows[:1])
        if error is None and taken < len(rows):
            more, error = await self._hand_over(rows[taken:])
            taken += more
        self._flows = error is None
        return taken, error

    async def _hand_over(self, rows: Sequence[Any]) -> tuple[int, WherryError | None]:
        return await events.publish_all(self._bus.transport, [self._outgoing(row) for row in rows])

    def _outgoing(self, row: Any) -> events.Outgoing:
        _, event_id, namespace, topic, at, event = row
        node = self._bus.node
        data = events.encode_parts(event_id, at, namespace, topic, node, event)
        return events.Outgoing(subjects.event(node, namespace, topic), data, event_id)

    def _put_aside_beside(self) -> None:
        """Put aside while what comes next is sent: no event waits for that."""
        if self._moving is None or self._moving.done():
            self._moving = asyncio.get_running_loop().create_task(self._try_to_put_aside())

    async def _try_to_put_aside(self) -> None:
        try:
            await self._put_aside()
        except Exception as e:  # whatever it is, it is tried again as long as there is something to put aside
            log.info("what was sent stays in the outbox: %s", e)
            await asyncio.sleep(PAUSE_LAST)

    async def _put_aside(self) -> None:
        """What the stream has is kept until its files surely have it, too."""
        upto = self._sent
        if upto <= self._aside:
            return
        synced = self._recent.note(upto)

        def move(tx: Transaction) -> None:
            tx.execute(
                f"INSERT OR REPLACE INTO sent ({_COLUMNS}, boot) SELECT {_COLUMNS}, ? FROM outbox WHERE seq <= ?",  # noqa: S608
                (self._boot, upto),
            )
            tx.execute("DELETE FROM outbox WHERE seq <= ?", (upto,))
            tx.execute("DELETE FROM sent WHERE seq <= ?", (synced,))

        # After a power cut they are in one of the two tables, and go again in either case. On a full disk they stay
        # where they are: this frees nothing, and the ballast is for removals.
        await self._database.write(move, durable=False)
        self._aside = upto
