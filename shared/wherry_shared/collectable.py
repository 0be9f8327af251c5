"""A service's part in garbage collections: its records told, its changes noted, its mutations held, the dead removed.

A service gives a `Kind` for each of its tables, and what `reap` does; the operations of `api.gc.Collectable` follow.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

from . import epoch as epochs
from .api.gc import Activity, Collectable
from .contract import pack
from .references import Node, Page, decode
from .sqlite import Database, Transaction

# Rows of the journal looked at for one page of changes.
CHANGES = 2000
BEGINNING = ("", "", "")


class Kind(Protocol):
    """The records of one table."""

    def covers(self, type: str) -> bool:
        """Whether nodes of that type are of this table."""
        ...

    def walk(self, connection: sqlite3.Connection, after: tuple[str, str, str]) -> Iterator[Node]:
        """All nodes behind (type, namespace, key), in that order; `BEGINNING` for all."""
        ...

    def find(self, connection: sqlite3.Connection, type: str, namespace: str, key: str) -> Node | None:
        """One node as it is, or None."""
        ...

    def remove(self, tx: Transaction, type: str, namespace: str, keys: Sequence[str]) -> int:
        """Remove records in that order, and publish what is told of it; answers how many there were."""
        ...


class Records:
    """The table of `catalog.SCHEMA`.

    describe: completes a node out of the record's document. removed: publishes that one was removed.
    """

    def __init__(
        self, type: str, describe: Callable[[Node, bytes], None],
        removed: Callable[[Transaction, str, str], None] | None = None,
    ) -> None:  # fmt: skip
        self._type = type
        self._describe = describe
        self._removed = removed

    def covers(self, type: str) -> bool:
        return type == self._type

    def walk(self, connection: sqlite3.Connection, after: tuple[str, str, str]) -> Iterator[Node]:
        rows = connection.execute(
            "SELECT namespace, key, record FROM records WHERE (namespace, key) > (?, ?) ORDER BY namespace, key",
            after[1:],
        )
        with closing(rows):
            for namespace, key, document in rows:
                node = Node(self._type, namespace, key)
                self._describe(node, document)
                yield node

    def find(self, connection: sqlite3.Connection, type: str, namespace: str, key: str) -> Node | None:
        row = connection.execute(
            "SELECT record FROM records WHERE namespace = ? AND key = ?", (namespace, key)
        ).fetchone()
        if row is None:
            return None
        node = Node(type, namespace, key)
        self._describe(node, row[0])
        return node

    def remove(self, tx: Transaction, type: str, namespace: str, keys: Sequence[str]) -> int:
        count = 0
        for key in keys:
            if tx.execute("DELETE FROM records WHERE namespace = ? AND key = ?", (namespace, key)).rowcount:
                count += 1
                if self._removed is not None:
                    self._removed(tx, namespace, key)
        return count


def migration(type: str) -> str:
    """The migration that lets a database of `catalog.SCHEMA` take part."""
    return f"{epochs.SCHEMA};\n{epochs.journal('records', repr(type), 'row.key')}"


class Collection(Collectable):
    """One database's part in collections. reap: removes what no record names any more, in backends."""

    def __init__(
        self, database: Database, kinds: Sequence[Kind], reap: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._database = database
        self._kinds = kinds
        self._reap = reap

    async def activity(self) -> Activity:
        deletions, changes = await self._database.aside(lambda connection: epochs.activity(connection.execute))
        return Activity(deletions=deletions, changes=changes)

    async def begin(self, epoch: str, seconds: float) -> None:
        await self._database.collect(lambda tx: epochs.begin(tx.execute, epoch, seconds), durable=False)

    async def nodes(self, after: bytes = b"") -> bytes:
        return await self._database.aside(lambda connection: self._page(connection, after))

    def _page(self, connection: sqlite3.Connection, after: bytes) -> bytes:
        number, *place = decode(after) if after else (0, *BEGINNING)
        page = Page()
        for index in range(number, len(self._kinds)):
            for node in self._kinds[index].walk(connection, (place[0], place[1], place[2])):
                if not page.add(node):
                    return page.encode(pack([index, *place]))
                place = [node.type, node.namespace, node.key]
            place = list(BEGINNING)
        return page.encode(b"")

    async def freeze(self, epoch: str, seconds: float) -> None:
        await self._database.collect(lambda tx: epochs.freeze(tx.execute, epoch, seconds), durable=False)

    async def changed(self, epoch: str, after: int = 0) -> bytes:
        return await self._database.aside(lambda connection: self._changes(connection, epoch, after))

    def _changes(self, connection: sqlite3.Connection, epoch: str, after: int) -> bytes:
        """The page's head: the last sequence number in it, and whether there are more."""
        epochs.check(connection.execute, epoch)
        page = Page()
        rows = epochs.changes(connection.execute, after, CHANGES)
        for seq, type, namespace, key in rows:
            node = self._kind(type).find(connection, type, namespace, key)
            if not page.add(node or Node(type, namespace, key, gone=True)):
                return page.encode(after, True)
            after = seq
        return page.encode(after, len(rows) == CHANGES)

    async def sweep(self, epoch: str, dead: bytes) -> int:
        def remove(tx: Transaction) -> int:
            epochs.check_frozen(tx.execute, epoch)
            self._database.prepare_sweep()
            epochs.sweeping(tx.execute, on=True)
            groups: list[Any] = decode(dead)
            count = sum(self._kind(type).remove(tx, type, namespace, keys) for type, namespace, keys in groups)
            epochs.sweeping(tx.execute, on=False)
            epochs.check_frozen(tx.execute, epoch)
            return count

        return await self._database.collect(remove)

    async def thaw(self, epoch: str) -> None:
        await self._database.collect(lambda tx: epochs.thaw(tx.execute, epoch), durable=False)

    async def end(self, epoch: str) -> None:
        await self._database.checkpoint()
        await self._database.collect(lambda tx: epochs.end(tx.execute, epoch), durable=False)

    async def reap(self) -> None:
        if self._reap is not None:
            await self._reap()

    def _kind(self, type: str) -> Kind:
        return next(kind for kind in self._kinds if kind.covers(type))


def labels_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The labels of a record's document, which lacks them where there are none."""
    labels: dict[str, str] = record.get("labels", {})
    return labels
