"""The rows of the snapshot service: one per snapshot of any snapshotter, and the counter of directory numbers."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from wherry_shared import epoch
from wherry_shared.api.snapshot import Info, Kind, Usage
from wherry_shared.references import PREFIX, SNAPSHOTS, Node
from wherry_shared.sqlite import Database, Transaction

MIGRATIONS = (
    """
    CREATE TABLE snapshots (
        number INTEGER PRIMARY KEY, namespace TEXT NOT NULL, snapshotter TEXT NOT NULL, name TEXT NOT NULL,
        kind TEXT NOT NULL, parent INTEGER REFERENCES snapshots (number), labels TEXT NOT NULL,
        inherited TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
        size INTEGER NOT NULL DEFAULT 0, inodes INTEGER NOT NULL DEFAULT 0, UNIQUE (snapshotter, namespace, name));
    CREATE INDEX snapshots_parent ON snapshots (parent);
    CREATE TABLE numbers (next INTEGER NOT NULL);
    INSERT INTO numbers VALUES (1)
    """,
    """
    CREATE TABLE unsynced (
        number INTEGER PRIMARY KEY REFERENCES snapshots (number) ON DELETE CASCADE, boot TEXT NOT NULL)
    """,
    f"{epoch.SCHEMA};\n{epoch.journal('snapshots', repr(SNAPSHOTS) + ' || row.snapshotter', 'row.name')}",
    """
    CREATE TABLE prepared (
        number INTEGER PRIMARY KEY REFERENCES snapshots (number) ON DELETE CASCADE, boot TEXT NOT NULL)
    """,
)

# Numbers are taken from the counter this many at a time, so that a directory costs no transaction before its row's.
BLOCK = 64

_SELECT = """
    SELECT s.number, s.namespace, s.snapshotter, s.name, s.kind, p.name, s.parent, s.labels, s.inherited,
           s.created_at, s.updated_at, s.size, s.inodes
    FROM snapshots s LEFT JOIN snapshots p ON p.number = s.parent
"""
_CHAIN = """
    WITH RECURSIVE chain (number, depth) AS (
        SELECT ?, 0 UNION ALL
        SELECT s.parent, depth + 1 FROM snapshots s JOIN chain c ON s.number = c.number WHERE s.parent IS NOT NULL)
    SELECT number FROM chain ORDER BY depth
"""


# containerd's name for what a layer is unpacked into, before it is committed.
_UNPACKING = re.compile(r"extract-\S+ sha256:[0-9a-f]{64}")


def is_unpacking(name: str) -> bool:
    """Whether a snapshot of that name is a layer on its way: nobody but its pull knows it."""
    return _UNPACKING.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Place:
    """The key space that a name is in."""

    namespace: str
    snapshotter: str


@dataclass(frozen=True, slots=True)
class Row:
    """One snapshot. `above` is its parent's number, None for a base."""

    number: int
    place: Place
    name: str
    kind: Kind
    parent: str
    above: int | None
    labels: dict[str, str]
    inherited: dict[str, str]
    created_at: datetime
    updated_at: datetime
    usage: Usage
    weight: int

    @property
    def info(self) -> Info:
        return Info(
            kind=self.kind, name=self.name, parent=self.parent, labels=self.labels, created_at=self.created_at,
            updated_at=self.updated_at,
        )  # fmt: skip


class Rows:
    """The snapshots in one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._taking = asyncio.Lock()
        self._numbers: Iterator[int] = iter(())

    async def number(self) -> int:
        """A number that no directory ever had. ResourceExhausted when the disk is full."""
        async with self._taking:
            number = next(self._numbers, None)
            if number is None:
                number = await self.database.write(_take_block)
                self._numbers = iter(range(number + 1, number + BLOCK))
            return number

    def next_number(self) -> int:
        """No directory has this number or a higher one, unless the database is older than the directories."""
        found: int = self.database.one("SELECT next FROM numbers")[0]
        return found

    def pass_over(self, tx: Transaction, number: int) -> None:
        """Let every number given out from now on be higher."""
        tx.execute("UPDATE numbers SET next = max(next, ?)", (number + 1,))

    def numbers(self, snapshotter: str) -> set[int]:
        """Every directory that a snapshot owns."""
        return {n for (n,) in self.database.all("SELECT number FROM snapshots WHERE snapshotter = ?", (snapshotter,))}

    def kinds(self, snapshotter: str) -> list[tuple[int, Kind]]:
        """Every directory that a snapshot owns, and what the snapshot is."""
        return self.database.all("SELECT number, kind FROM snapshots WHERE snapshotter = ?", (snapshotter,))

    def unsynced(self, snapshotter: str) -> dict[int, str]:
        """The committed snapshots whose files are not known to be durable, and in which boot they were committed."""
        return self._marks("unsynced", snapshotter)

    def prepared(self, snapshotter: str) -> dict[int, str]:
        """The snapshots whose directories are not known to be durable, and in which boot they were made."""
        return self._marks("prepared", snapshotter)

    def _marks(self, table: str, snapshotter: str) -> dict[int, str]:
        marks = f"SELECT m.number, m.boot FROM {table} m JOIN snapshots s USING (number) WHERE s.snapshotter = ?"  # noqa: S608
        return dict(self.database.all(marks, (snapshotter,)))

    def mark_unsynced(self, tx: Transaction, number: int, boot: str) -> None:
        tx.execute("INSERT INTO unsynced (number, boot) VALUES (?, ?)", (number, boot))

    def mark_prepared(self, tx: Transaction, number: int, boot: str) -> None:
        tx.execute("INSERT INTO prepared (number, boot) VALUES (?, ?)", (number, boot))

    def mark_synced(self, tx: Transaction, committed: Iterable[int], prepared: Iterable[int]) -> None:
        """What was committed before a flush, and what was prepared before it and may be committed since."""
        for number in committed:
            tx.execute("DELETE FROM unsynced WHERE number = ?", (number,))
        for number in prepared:
            tx.execute("DELETE FROM prepared WHERE number = ?", (number,))

    def get(self, tx: Transaction, number: int) -> Row:
        """The snapshot that owns a directory."""
        return _row(tx.one(f"{_SELECT} WHERE s.number = ?", (number,)))

    def owners(self, numbers: Sequence[int]) -> list[Row]:
        """The snapshots that own these directories, in the numbers' order."""
        found = (self.database.one(f"{_SELECT} WHERE s.number = ?", (number,)) for number in numbers)
        return [_row(each) for each in found if each is not None]

    def find(self, source: Database | Transaction, place: Place, name: str) -> Row | None:
        """One snapshot, or None."""
        found = source.one(
            f"{_SELECT} WHERE s.snapshotter = ? AND s.namespace = ? AND s.name = ?",
            (place.snapshotter, place.namespace, name),
        )
        return None if found is None else _row(found)

    def after(self, place: Place, name: str, limit: int) -> list[Row]:
        """The next snapshots behind `name`, in order of their names."""
        found = self.database.all(
            f"{_SELECT} WHERE s.snapshotter = ? AND s.namespace = ? AND s.name > ? ORDER BY s.name LIMIT ?",
            (place.snapshotter, place.namespace, name, limit),
        )
        return [_row(r) for r in found]

    def chain(self, source: Database | Transaction, number: int | None) -> tuple[int, ...]:
        """`number` and every parent of it, the nearest first; nothing for None."""
        if number is None:
            return ()
        if isinstance(source, Transaction):
            return tuple(n for (n,) in source.execute(_CHAIN, (number,)).fetchall())
        return tuple(n for (n,) in source.all(_CHAIN, (number,)))

    def above(self, tx: Transaction, numbers: Iterable[int]) -> list[Row]:
        """What stands on these directly."""
        found = (tx.execute(f"{_SELECT} WHERE s.parent = ?", (number,)).fetchall() for number in numbers)
        return [_row(each) for rows in found for each in rows]

    def has_children(self, tx: Transaction, number: int) -> bool:
        return tx.one("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", (number,)) is not None

    def insert(self, tx: Transaction, row: Row) -> None:
        """Add a snapshot, whose name is free."""
        tx.execute(
            "INSERT INTO snapshots (number, namespace, snapshotter, name, kind, parent, labels, inherited, created_at,"
            " updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (row.number, row.place.namespace, row.place.snapshotter, row.name, row.kind, row.above, _text(row.labels),
             _text(row.inherited), row.created_at.isoformat(), row.updated_at.isoformat()),
        )  # fmt: skip

    def replace(self, tx: Transaction, row: Row) -> None:
        """Write all of a snapshot anew that can change: found by its number."""
        tx.execute(
            "UPDATE snapshots SET name = ?, kind = ?, parent = ?, labels = ?, created_at = ?, updated_at = ?, size = ?,"
            " inodes = ? WHERE number = ?",
            (row.name, row.kind, row.above, _text(row.labels), row.created_at.isoformat(), row.updated_at.isoformat(),
             row.usage.size, row.usage.inodes, row.number),
        )  # fmt: skip

    def delete(self, tx: Transaction, number: int) -> None:
        tx.execute("DELETE FROM snapshots WHERE number = ?", (number,))


def _take_block(tx: Transaction) -> int:
    """The first of a block of numbers taken now; a crash loses what is left of it, and no number comes twice."""
    first: int = tx.one("SELECT next FROM numbers")[0]
    tx.execute("UPDATE numbers SET next = ?", (first + BLOCK,))
    return first


def _text(labels: Mapping[str, str]) -> str:
    return json.dumps(labels, separators=(",", ":"))


def _row(found: Any) -> Row:
    number, namespace, snapshotter, name, kind, parent, above, labels, inherited, created, updated, size, inodes = found
    return Row(
        number=number, place=Place(namespace, snapshotter), name=name, kind=kind, parent=parent or "", above=above,
        labels=json.loads(labels), inherited=json.loads(inherited), created_at=datetime.fromisoformat(created),
        updated_at=datetime.fromisoformat(updated), usage=Usage(size=size, inodes=inodes),
        weight=len(labels) + 4 * (len(name) + len(parent or "")) + 128,
    )  # fmt: skip


_NODES = "SELECT s.snapshotter, s.namespace, s.name, p.name, s.labels FROM snapshots s LEFT JOIN snapshots p "
_NODES += "ON p.number = s.parent WHERE "


class SnapshotRecords:
    """The snapshots as the garbage collector sees them."""

    def covers(self, type: str) -> bool:
        return type.startswith(SNAPSHOTS)

    def walk(self, connection: sqlite3.Connection, after: tuple[str, str, str]) -> Iterator[Node]:
        rows = connection.execute(
            f"{_NODES} (s.snapshotter, s.namespace, s.name) > (?, ?, ?) ORDER BY s.snapshotter, s.namespace, s.name",
            (after[0].removeprefix(SNAPSHOTS), *after[1:]),
        )
        with closing(rows):
            yield from map(_node, rows)

    def find(self, connection: sqlite3.Connection, type: str, namespace: str, key: str) -> Node | None:
        row = connection.execute(
            f"{_NODES} s.snapshotter = ? AND s.namespace = ? AND s.name = ?",
            (type.removeprefix(SNAPSHOTS), namespace, key),
        ).fetchone()
        return None if row is None else _node(row)

    def remove(self, tx: Transaction, type: str, namespace: str, keys: Sequence[str]) -> int:
        """Children come before their parents: the database refuses the contrary."""
        snapshotter, count = type.removeprefix(SNAPSHOTS), 0
        for key in keys:
            count += tx.execute(
                "DELETE FROM snapshots WHERE snapshotter = ? AND namespace = ? AND name = ?",
                (snapshotter, namespace, key),
            ).rowcount
            tx.publish("/snapshot/remove", {"key": key, "snapshotter": snapshotter}, namespace=namespace)
        return count


def _node(row: Any) -> Node:
    snapshotter, namespace, name, parent, labels = row
    node = Node(SNAPSHOTS + snapshotter, namespace, name)
    if parent is not None:
        node.hard.append((node.type, parent))
    if PREFIX in labels:
        node.refer(json.loads(labels), rootable=True)
    return node
