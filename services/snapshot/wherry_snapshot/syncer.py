"""Whether what is committed survives a power cut (docs/decisions/0007).

A commit is answered when its row is durable, not when its files are. The row is marked until the filesystem was
flushed, a moment later and for many at once. A mark of an earlier boot says that the power went before: such a
snapshot may lack data, and is taken back, so that its layer is unpacked again. What was prepared is marked, too: its
directory may be gone, and is made again, empty, for nothing in it was durable either. Where it began as a copy of its
parent's files, some of these may be gone among others that its owner made durable: it is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

from wherry_shared.boot import boot_id
from wherry_shared.errors import DataLoss, InvalidArgument, WherryError
from wherry_shared.sqlite import Transaction

from .backends import Backend
from .metadata import Row, Rows, is_unpacking
from .workers import Workers

log = logging.getLogger("wherry.snapshot")

DELAY = 2.0
"""Seconds between a commit and the flush: what is committed meanwhile goes along."""
MODES = ("background", "commit", "off")


class Syncer:
    """Flushes one backend's filesystem by the mode, one of MODES."""

    def __init__(self, name: str, rows: Rows, backend: Backend, workers: Workers, mode: str) -> None:
        if mode not in MODES:
            raise InvalidArgument(f"setting sync={mode!r}: it is one of {', '.join(MODES)}")
        self._name, self._rows, self._backend, self._workers = name, rows, backend, workers
        self._mode = mode
        self._boot = boot_id()
        self._pending = False
        self._closing = asyncio.Event()
        # Of an earlier boot, and maybe without all data: committed, with others on them, or begun as copies.
        self.suspect: frozenset[int] = frozenset()

    async def start(self) -> None:
        """Take back what an earlier boot committed and did not flush; `check` refuses what has to stay."""
        marks = self._rows.unsynced(self._name)
        lost = {number for number, boot in marks.items() if boot != self._boot}
        if lost:
            self.suspect = await self._rows.database.write(lambda tx: self._take_back(tx, lost))
            for number in self.suspect:
                log.error("%s: snapshot directory %d may lack data since the power went", self._backend.root, number)
        if len(lost) < len(marks) or (self._backend.copies and self._boot in self._rows.prepared(self._name).values()):
            self._arm()

    def _take_back(self, tx: Transaction, lost: set[int]) -> frozenset[int]:
        """Remove the marked snapshots on which nothing stands, from the top down; answers what is left.

        A layer whose unpacking the power ended goes first: it would keep its parent from being unpacked again.
        """
        for row in self._rows.above(tx, lost):
            if row.kind == "active" and is_unpacking(row.name):
                self._remove(tx, row)
        left = set(lost)
        while gone := {n for n in left if not self._rows.has_children(tx, n)}:
            for number in gone:
                self._remove(tx, self._rows.get(tx, number))
            left -= gone
        return frozenset(left)

    def _remove(self, tx: Transaction, row: Row) -> None:
        log.error("snapshot %r may lack data since the power went: it is taken back", row.name)
        self._rows.delete(tx, row.number)
        event = {"key": row.name, "snapshotter": self._name}
        tx.publish("/snapshot/remove", event, namespace=row.place.namespace)

    def check(self, chain: Iterable[int], what: str, own: int = 0) -> None:
        """DataLoss when a directory may lack data: one of those under `what`, or its own."""
        if own in self.suspect:
            raise DataLoss(
                f"snapshot {what!r}: its directory {own} may lack data: the power went before it was flushed. "
                "Remove it and prepare it again"
            )
        if self.suspect and (found := self.suspect.intersection(chain)):
            raise DataLoss(
                f"snapshot {what!r}: directory {min(found)} under it may lack data: the power went before it was "
                "flushed. Remove what stands on it and unpack it again"
            )

    async def before(self) -> None:
        """A snapshot is sealed, and about to be recorded as committed; or made, and about to be recorded."""
        if self._mode == "commit":
            await self._workers.run(self._backend.sync)

    def doubt(self, row: Row) -> bool:
        """Whether what an earlier boot prepared may be a part of a copy; `check` refuses it from here on."""
        if not (self._backend.copies and self._mode == "background" and row.kind == "active" and row.above):
            return False
        self.suspect |= {row.number}
        log.error("%s: snapshot directory %d may lack data since the power went", self._backend.root, row.number)
        return True

    def prepared(self, tx: Transaction, number: int) -> None:
        """In the transaction that records a new snapshot: its directory is not durable yet."""
        self._rows.mark_prepared(tx, number, self._boot)

    def cut_off(self) -> set[int]:
        """What an earlier boot prepared, and the power may have taken the directories of."""
        marks = self._rows.prepared(self._name)
        committed = {number for number, kind in self._rows.kinds(self._name) if kind == "committed"}
        return {number for number, boot in marks.items() if boot != self._boot} - committed

    async def settle(self, numbers: Iterable[int], again: Sequence[int]) -> None:
        """What was cut off is on the disk, but for what was made again just now."""

        def write(tx: Transaction) -> None:
            self._rows.mark_synced(tx, (), numbers)
            for number in again:
                self.prepared(tx, number)

        await self._rows.database.write(write, frees=True)
        if again and self._backend.copies:
            self.after()

    def mark(self, tx: Transaction, row: Row) -> None:
        """In the transaction that records the commit."""
        if self._mode == "background":
            self._rows.mark_unsynced(tx, row.number, self._boot)

    def after(self) -> None:
        """The commit is recorded."""
        if self._mode == "background":
            self._arm()

    def _arm(self) -> None:
        if not self._pending:
            self._pending = True
            self._workers.spawn(self._flush_soon())

    async def _flush_soon(self) -> None:
        try:
            async with asyncio.timeout(DELAY):
                await self._closing.wait()
        except TimeoutError:
            pass
        self._pending = False  # what is committed from here on is not surely in this flush
        committed = [number for number, boot in self._rows.unsynced(self._name).items() if boot == self._boot]
        prepared = [number for number, boot in self._rows.prepared(self._name).items() if boot == self._boot]
        try:
            await self._workers.run(self._backend.sync)
            await self._rows.database.write(lambda tx: self._rows.mark_synced(tx, committed, prepared), frees=True)
        except WherryError as e:  # it is tried again with the next commit, and at the next start
            log.error("%s is not flushed: %s", self._backend.root, e)

    async def close(self) -> None:
        """Flush what waits for it."""
        self._closing.set()
