"""The rules of snapshots (containerd's): which may be made, committed and removed, and in what order that is done.

A directory is made before its row and removed after it, so a crash leaves directories that no row owns, never a row
without its directory. What no row owns is removed at the start and by `cleanup`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from wherry_shared.api.snapshot import (
    GID_LABEL,
    INHERITED_PREFIX,
    REBASE_LABEL,
    REF_LABEL,
    UID_LABEL,
    Info,
    Kind,
    Usage,
)
from wherry_shared.catalog import LIMIT_MAX, PAGE_BYTES, check_mask, raise_if_replayed
from wherry_shared.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    WherryError,
)
from wherry_shared.filters import compile_filters, fields
from wherry_shared.sqlite import Database, Transaction
from wherry_shared.values import Mount, Page, now, stored_labels, update_labels

from .backends import REBASE, REMAP_IDS, Backend, Entry, Snapshot
from .metadata import Place, Row, Rows
from .syncer import Syncer
from .workers import Workers

Source = Database | Transaction

log = logging.getLogger("wherry.snapshot")

PATIENCE_MAX = 50.0  # below the endpoint's own bound
_TURNS = 2  # of the event loop, in which a removal's answer goes out before the reaper begins
_CHUNK = 64  # rows between two turns of the event loop


class Snapshotter:
    """The snapshots that one backend keeps, of every namespace."""

    def __init__(self, name: str, rows: Rows, backend: Backend, sync: str = "background") -> None:
        self.name = name
        self._rows = rows
        self._backend = backend
        self._workers = Workers(name, backend.root)
        self._syncer = Syncer(name, rows, backend, self._workers, sync)
        self._making: set[int] = set()
        self._committing: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._sweeping = asyncio.Lock()
        # The commits whose transactions are queued: the row to be, and the directories under it.
        self._queued: dict[tuple[Place, str], tuple[Row, tuple[int, ...]]] = {}
        self._awaited: WeakValueDictionary[tuple[Place, str], asyncio.Event] = WeakValueDictionary()

    async def start(self, *, restored: bool = False) -> None:
        """Begin to remove what an earlier process left. FailedPrecondition: the database is older than the directories.

        Without that check a database that was lost would be followed by all that it knew of. restored: it may be
        older; directories that it does not know are then set aside.
        """
        entries = await self._workers.run(self._backend.entries)
        if restored:
            await self._set_aside({e.number for e in entries if e.name.isdigit()})
            entries = await self._workers.run(self._backend.entries)
        elif any(e.number >= self._rows.next_number() for e in entries):
            raise FailedPrecondition(
                f"{self._backend.root} holds snapshots that {self._rows.database.path} does not know yet: the database "
                "is lost or out of date. Restore it, start with --set restore=backup to set them aside, or move the "
                "directory away to start empty"
            )
        await self._syncer.start()
        await self._make_again(entries)
        await self._workers.run(self._put_right, {e.number for e in entries})
        self._workers.spawn(self._sweep())

    async def _set_aside(self, there: set[int]) -> None:
        """Keep what the database may have known when it was backed up no longer, or not yet."""
        for number in sorted(there - self._rows.numbers(self.name)):  # the highest last: till then a start is refused
            log.error("%s: directory %d is of no known snapshot, and now lost-%d", self._backend.root, number, number)
            await self._workers.run(self._backend.set_aside, number)
        if there:
            await self._rows.database.write(lambda tx: self._rows.pass_over(tx, max(there)))

    async def _make_again(self, entries: Sequence[Entry]) -> None:
        """Make again what the power took of directories: what is fsynced in one makes itself durable, too.

        Where others are missing it was something else, and nobody knows what was in them: they stay missing.
        """
        missing = self._rows.numbers(self.name) - {e.number for e in entries if e.name.isdigit()}
        cut_off = self._syncer.cut_off()
        if not missing <= cut_off | self._syncer.suspect:
            for number in sorted(missing):
                log.error("%s: directory %d of a snapshot is missing", self._backend.root, number)
            return
        again, doubtful = list[int](), list[int]()
        parts = [e for e in entries if not e.name.isdigit()]  # of directories on their way to be or to go: a few
        for row in self._rows.owners(sorted(cut_off)):
            if await self._lost(row, [part.name for part in parts if part.number == row.number]):
                again.append(row.number)
            elif self._syncer.doubt(row):
                doubtful.append(row.number)
        if settled := cut_off.difference(doubtful):
            await self._syncer.settle(settled, again)

    async def _lost(self, row: Row, parts: Sequence[str]) -> bool:
        """Whether the power took something of a directory that was prepared; it is then made again, if it can be."""
        try:
            if not await self._workers.run(self._complete, self._snapshot(row), parts):
                return False
            log.warning("snapshot %r was prepared as the power went: what was lost of it is made again", row.name)
        except NotFound as e:  # with what it stands on
            log.error("snapshot %r was prepared as the power went, and cannot be made again: %s", row.name, e)
        return True

    def _complete(self, snapshot: Snapshot, parts: Sequence[str]) -> bool:
        """parts: what was on its way to be this snapshot's directory."""
        for name in parts:
            self._backend.delete(name, self._workers.check_closing)
        return self._backend.make_again(snapshot, self._workers.check_closing)

    def _put_right(self, there: set[int]) -> None:
        """End the commits that a crash cut off: the row says which way."""
        for number, kind in self._rows.kinds(self.name):
            if number in there and kind != "view":
                (self._backend.settle if kind == "committed" else self._backend.unseal)(number)

    async def close(self) -> None:
        """End what is under way. A removal that is stopped goes on at the next start."""
        await self._syncer.close()
        self._workers.closing = True
        for at in list(self._awaited):
            self._tell(at)
        await self._workers.close()

    # ---- making

    async def prepare(self, namespace: str, key: str, parent: str, labels: dict[str, str], kind: Kind) -> list[Mount]:
        """Make an active snapshot or a view, and answer its mounts."""
        raise_if_replayed(self._rows.database)
        wish = _Wish(self._place(namespace), key, parent, stored_labels(labels), kind)
        return await asyncio.shield(self._workers.spawn(self._make(wish)))

    async def _make(self, wish: _Wish) -> list[Mount]:
        chain = self._rows.chain(self._rows.database, self._parent_of(self._rows.database, wish))
        self._syncer.check(chain, wish.parent)
        if not chain and wish.kind == "active" and REBASE_LABEL in wish.inherited:
            self._check_rebase(FailedPrecondition)
        if wish.inherited.keys() & {UID_LABEL, GID_LABEL} and REMAP_IDS not in self._backend.capabilities:
            raise FailedPrecondition(
                f"snapshotter {self.name!r} cannot map ids here (overlay can, where the kernel does)"
            )
        number = await self._rows.number()
        snapshot = Snapshot(number, wish.kind, chain, wish.inherited)
        self._making.add(number)
        try:
            await self._create(snapshot, wish)
            mounts = await self._rows.database.mutate(lambda tx: self._insert(tx, wish, snapshot))
        except BaseException:
            self._discard(number)
            raise
        finally:
            self._making.discard(number)
        if self._backend.copies:
            self._syncer.after()
        return mounts

    async def _create(self, snapshot: Snapshot, wish: _Wish) -> None:
        check = self._workers.check_deadline()
        try:
            await self._workers.run(self._backend.create, snapshot, check)
        except (NotFound, Aborted) as e:
            # Its parent went while it was looked at: that is then what to say.
            self._still_above(self._rows.database, wish, snapshot)
            if isinstance(e, Aborted):
                raise
            raise DataLoss(f"snapshot {wish.key!r}: the tree of its parent {wish.parent!r} is damaged: {e}") from e
        if self._backend.copies:
            await self._syncer.before()
        check()  # nobody waits for it any more: it must not appear late

    def _insert(self, tx: Transaction, wish: _Wish, snapshot: Snapshot) -> list[Mount]:
        above = self._still_above(tx, wish, snapshot)
        at = now()
        self._rows.insert(
            tx,
            Row(
                number=snapshot.number, place=wish.place, name=wish.key, kind=wish.kind, parent=wish.parent,
                above=above, labels=wish.labels, inherited=wish.inherited, created_at=at, updated_at=at,
                usage=Usage(size=0, inodes=0), weight=0,
            ),
        )  # fmt: skip
        self._syncer.prepared(tx, snapshot.number)
        if wish.kind == "active":
            self._publish(tx, "prepare", key=wish.key, parent=wish.parent)
        return self._backend.mounts(snapshot)

    def _still_above(self, source: Source, wish: _Wish, snapshot: Snapshot) -> int | None:
        """The parent's number, if it may still be made on what it was made on."""
        above = self._parent_of(source, wish)
        if self._rows.chain(source, above) != snapshot.parents:
            raise Aborted(f"parent snapshot {wish.parent!r} was replaced meanwhile")
        return above

    def _parent_of(self, source: Source, wish: _Wish) -> int | None:
        """The number of the wished snapshot's parent. Raises when it may not be made."""
        ref = wish.labels.get(REF_LABEL)
        if ref and wish.kind == "active":
            there = self._rows.find(source, wish.place, ref)
            if there is not None and there.kind == "committed":
                raise AlreadyExists(f"snapshot {ref!r}, which {REF_LABEL} names: already exists")
        if self._rows.find(source, wish.place, wish.key) is not None:
            raise AlreadyExists(f"snapshot {wish.key!r}: already exists")
        return self._committed(source, wish.place, wish.parent).number if wish.parent else None

    # ---- committing

    async def commit(
        self, namespace: str, name: str, key: str, parent: str, labels: dict[str, str], patience: float
    ) -> Info:
        """Turn an active snapshot into a committed one."""
        raise_if_replayed(self._rows.database)
        place, kept = self._place(namespace), stored_labels(labels)
        now_is = asyncio.get_running_loop().time
        give_up = now_is() + min(patience, PATIENCE_MAX)
        while True:
            if parent and patience > 0:
                await self._await_parent(place, parent, give_up - now_is())
            with suppress(_NotUnder):
                return await asyncio.shield(self._workers.spawn(self._commit(place, name, key, parent, kept)))

    async def _await_parent(self, place: Place, parent: str, patience: float) -> None:
        """Return when the parent is committed or about to be, or when it is not for so long: the commit then says why.

        A commit whose transaction is queued is good enough: one that is queued behind it finds it done.
        """
        at = place, parent
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not self._workers.closing and at not in self._queued:
                    there = self._rows.find(self._rows.database, place, parent)
                    if there is not None and there.kind == "committed":
                        return
                    event = self._awaited.setdefault(at, asyncio.Event())
                    await event.wait()

    def _tell(self, at: tuple[Place, str]) -> None:
        """Wake those who wait for a commit."""
        if (event := self._awaited.pop(at, None)) is not None:
            event.set()

    async def _commit(self, place: Place, name: str, key: str, parent: str, labels: dict[str, str]) -> Info:
        number = self._committable(self._rows.database, place, name, key, parent, ahead=True)[0].number
        async with self._alone(number):
            raise_if_replayed(self._rows.database)  # by the one that this has waited for
            row, above = self._committable(self._rows.database, place, name, key, parent, ahead=True)
            if row.number != number:
                raise Aborted(f"snapshot {key!r} was replaced meanwhile")
            chain = self._chain(above, row)
            try:
                usage = await self._seal(row, chain, rebase=above is not None or self._rebases(row))
                done = replace(row, name=name, kind="committed", labels=labels, usage=usage)
                info = await self._record(done, key, above, chain)
            except BaseException as e:
                await self._unseal(row)
                if above is not None and isinstance(e, WherryError):
                    self._check_under(above)
                raise
        self._syncer.after()
        self._workers.spawn(self._settle(number))
        return info

    def _chain(self, above: Row | None, row: Row) -> tuple[int, ...]:
        """The directories that will be under a snapshot, the nearest first."""
        if above is not None and (ahead := self._queued.get((above.place, above.name))) and ahead[0] is above:
            return above.number, *ahead[1]
        return self._rows.chain(self._rows.database, above.number if above else row.above)

    def _check_under(self, above: Row) -> None:
        """_NotUnder: the commit that one was queued behind came to nothing, so it is no fault of this one."""
        there = self._rows.find(self._rows.database, above.place, above.name)
        if there is None or there.number != above.number or there.kind != "committed":
            raise _NotUnder

    @asynccontextmanager
    async def _alone(self, number: int) -> AsyncIterator[None]:
        """One at a time for each directory: a commit must not undo what another one builds on."""
        lock = self._committing.setdefault(number, asyncio.Lock())
        async with lock:
            yield

    async def _seal(self, row: Row, chain: tuple[int, ...], *, rebase: bool) -> Usage:
        self._syncer.check(chain, row.name, row.number)
        check = self._workers.check_deadline()
        sealed = Snapshot(row.number, row.kind, chain, row.inherited)
        usage = await self._on_disk(row, self._backend.seal, sealed, rebase, check)
        await self._syncer.before()
        check()
        return usage

    async def _unseal(self, row: Row) -> None:
        """After a commit that failed, if that was not because the snapshot is committed or gone."""
        there = self._rows.find(self._rows.database, row.place, row.name)
        if there is not None and there.number == row.number and there.kind == "active":
            with suppress(WherryError):  # it is tried again at the next start
                await self._workers.run(self._backend.unseal, row.number)

    async def _settle(self, number: int) -> None:
        async with self._alone(number):
            with suppress(WherryError):
                await self._workers.run(self._backend.settle, number)

    async def _record(self, done: Row, key: str, above: Row | None, chain: tuple[int, ...]) -> Info:
        """Queue the transaction; whoever waits for this snapshot goes on at once, to be queued behind it."""
        parent = above.name if above else ""

        def write(tx: Transaction) -> Info:
            row, still_above = self._committable(tx, done.place, done.name, key, parent)
            if row.number != done.number or (still_above and still_above.number) != (above and above.number):
                raise Aborted(f"snapshot {key!r} or its parent was replaced meanwhile")
            at = now()
            row = replace(done, created_at=at, updated_at=at)
            if above is not None:
                row = replace(row, parent=above.name, above=above.number)
            self._rows.replace(tx, row)
            self._syncer.mark(tx, row)
            self._publish(tx, "commit", key=key, name=row.name)
            return self._info(row)

        ahead, name = (done, chain), (done.place, done.name)
        first = self._queued.setdefault(name, ahead) is ahead
        self._tell(name)
        try:
            return await self._rows.database.mutate(write)
        finally:
            if first:
                del self._queued[name]
            self._tell(name)

    def _committable(
        self, source: Source, place: Place, name: str, key: str, parent: str, *, ahead: bool = False
    ) -> tuple[Row, Row | None]:
        """The active snapshot `key`, and the parent that it is to be put onto, if any. Raises when it may not be.

        ahead: the parent may be one whose commit is queued, as it will be.
        """
        if self._rows.find(source, place, name) is not None:
            raise AlreadyExists(f"snapshot {name!r}: already exists")
        row = self._found(source, place, key)
        if row.kind != "active":
            raise FailedPrecondition(f"snapshot {key!r} is {_KINDS[row.kind]}: only an active one can be committed")
        if not parent or row.parent == parent:
            return row, None
        self._check_rebase(InvalidArgument)
        if row.parent:
            raise FailedPrecondition(f"snapshot {key!r} has the parent {row.parent!r}: it cannot get another")
        if not self._rebases(row):
            raise FailedPrecondition(f"snapshot {key!r} was not prepared with the label {REBASE_LABEL}")
        if ahead and (place, parent) in self._queued:
            return row, self._queued[place, parent][0]
        return row, self._committed(source, place, parent)

    def _rebases(self, row: Row) -> bool:
        """Whether an active snapshot was prepared to get its parent at its commit, where the backend can do that."""
        return not row.parent and REBASE_LABEL in row.inherited and REBASE in self._backend.capabilities

    def _check_rebase(self, error: type[WherryError]) -> None:
        if REBASE not in self._backend.capabilities:
            raise error(f"snapshotter {self.name!r} cannot rebase: prepare the snapshot on its parent")

    # ---- removing

    async def remove(self, namespace: str, key: str) -> None:
        """Remove a snapshot that nothing stands on; its directory goes afterwards."""
        await asyncio.shield(self._workers.spawn(self._remove(self._place(namespace), key)))

    async def _remove(self, place: Place, key: str) -> None:
        removed = 0

        def write(tx: Transaction) -> None:
            nonlocal removed
            row = self._found(tx, place, key)
            if self._rows.has_children(tx, row.number):
                raise FailedPrecondition(f"cannot remove snapshot {key!r}: others stand on it")
            self._rows.delete(tx, row.number)
            self._publish(tx, "remove", key=key)
            removed = row.number

        await self._rows.database.mutate(write, frees=True)
        self._discard(removed)

    async def cleanup(self) -> None:
        """Remove every directory that no snapshot owns; back when they are gone."""
        await asyncio.shield(self._workers.spawn(self._sweep()))

    def _discard(self, number: int) -> None:
        self._workers.spawn(self._reap_soon(number))

    async def _reap_soon(self, number: int) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        await self._workers.reap(self._detach_and_delete, number)

    def _detach_and_delete(self, number: int) -> None:
        try:
            self._backend.detach(number)
        except OSError as e:
            log.warning("directory %d cannot be renamed, and is removed where it is: %s", number, e)
            self._backend.delete(str(number), self._workers.check_closing)
        self._backend.delete(f"rm-{number}", self._workers.check_closing)

    async def _sweep(self) -> None:
        async with self._sweeping:
            # The directories first: what is made meanwhile is either not among them, or known when they are compared.
            entries = await self._workers.run(self._backend.entries)
            kept = self._rows.numbers(self.name) | self._making
            for entry in entries:
                if entry.number not in kept or entry.name.startswith("rm-"):
                    log.info("%s: removing %s, which no snapshot owns", self._backend.root, entry.name)
                    await self._workers.reap(self._backend.delete, entry.name, self._workers.check_closing)

    # ---- asking and labelling

    def mounts(self, namespace: str, key: str) -> list[Mount]:
        """The mounts of an active snapshot or a view."""
        row = self._found(self._rows.database, self._place(namespace), key)
        if row.kind == "committed":
            raise FailedPrecondition(f"snapshot {key!r} is committed and has no mounts: prepare or view one on it")
        snapshot = self._snapshot(row)
        self._syncer.check(snapshot.parents, key, row.number)
        return self._backend.mounts(snapshot)

    def stat(self, namespace: str, key: str) -> Info:
        """One snapshot."""
        return self._info(self._found(self._rows.database, self._place(namespace), key))

    async def update(self, namespace: str, key: str, labels: dict[str, str], mask: Sequence[str]) -> Info:
        """Change a snapshot's labels; an empty mask replaces all."""
        check_mask(mask, ("labels",), ("labels",))
        place = self._place(namespace)

        def write(tx: Transaction) -> Info:
            old = self._found(tx, place, key)
            row = replace(old, labels=update_labels(old.labels, labels, mask or ("labels",)), updated_at=now())
            self._rows.replace(tx, row)
            return self._info(row)

        return await self._rows.database.mutate(write)

    async def walk(self, namespace: str, filters: Sequence[str], after: str, limit: int) -> Page[Info]:
        """A window of the snapshots that any filter matches (kind, name, parent, labels.*)."""
        matches = compile_filters(filters)
        limit = min(max(limit, 1), LIMIT_MAX)
        place = self._place(namespace)
        items: list[Info] = []
        size = 0
        while True:
            rows = self._rows.after(place, after, _CHUNK)
            for row in rows:
                if matches.everything or matches(_fields(row)):
                    if items and (len(items) == limit or size + row.weight > PAGE_BYTES):
                        return Page[Info](items=items, next=after)
                    items.append(self._info(row))
                    size += row.weight
                after = row.name
            if len(rows) < _CHUNK:
                return Page[Info](items=items)
            await asyncio.sleep(0)

    async def usage(self, namespace: str, key: str) -> Usage:
        """What a snapshot takes: measured when active, else as stored (a view takes nothing of its own)."""
        row = self._found(self._rows.database, self._place(namespace), key)
        if row.kind != "active":
            return row.usage
        return await self._on_disk(row, self._backend.usage, self._snapshot(row), self._workers.check_deadline())

    async def _on_disk(self, row: Row, work: Callable[..., Usage], *args: Any) -> Usage:
        try:
            return await self._workers.run(work, *args)
        except NotFound:
            self._found(self._rows.database, row.place, row.name)  # it went meanwhile, or its directory is lost
            raise DataLoss(f"snapshot {row.name!r}: its directory {row.number} is missing") from None

    def _snapshot(self, row: Row) -> Snapshot:
        return Snapshot(row.number, row.kind, self._rows.chain(self._rows.database, row.above), row.inherited)

    def _info(self, row: Row) -> Info:
        shown = self._backend.shown_labels(row.number)
        return row.info.model_copy(update={"labels": {**row.labels, **shown}}) if shown else row.info

    def _place(self, namespace: str) -> Place:
        return Place(namespace, self.name)

    def _found(self, source: Source, place: Place, key: str) -> Row:
        row = self._rows.find(source, place, key)
        if row is None:
            raise NotFound(f"snapshot {key!r}: not found")
        return row

    def _committed(self, source: Source, place: Place, parent: str) -> Row:
        row = self._rows.find(source, place, parent)
        if row is None:
            raise NotFound(f"parent snapshot {parent!r}: not found")
        if row.kind != "committed":
            raise InvalidArgument(f"parent snapshot {parent!r} is {_KINDS[row.kind]}: only a committed one can be")
        return row

    def _publish(self, tx: Transaction, what: str, **event: str) -> None:
        tx.publish(f"/snapshot/{what}", {**event, "snapshotter": self.name})


class _NotUnder(Exception):
    """What a commit was to stand on is not committed after all."""


_KINDS = {"active": "active", "view": "a view", "committed": "committed"}


@dataclass(frozen=True, slots=True)
class _Wish:
    """A snapshot that is to be made; its labels as they are kept."""

    place: Place
    key: str
    parent: str
    labels: dict[str, str]
    kind: Kind

    @property
    def inherited(self) -> dict[str, str]:
        """The labels that the backend is told of."""
        return {k: v for k, v in self.labels.items() if k == REF_LABEL or k.startswith(INHERITED_PREFIX)}


def _fields(row: Row) -> Any:
    return fields({"kind": row.kind, "name": row.name, "parent": row.parent}, labels=row.labels)
