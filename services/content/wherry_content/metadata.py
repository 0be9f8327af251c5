"""What the content service remembers: blobs and ingests per namespace.

Callbacks named `place`, `remove` or `check` run inside a write transaction. All replicas on a root share its lock,
so that a file disappears with its rows, and appears with them or before: never a row without its file.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import datetime
from typing import Any

from wherry_shared import context, epoch
from wherry_shared.api.content import Info, Ingest, Opened
from wherry_shared.catalog import SCHEMA, Table, check_mask
from wherry_shared.collectable import migration
from wherry_shared.errors import AlreadyExists, NotFound, WherryError
from wherry_shared.filters import compile_filters, fields
from wherry_shared.references import CONTENT, INGESTS, Node
from wherry_shared.sqlite import Database, Transaction
from wherry_shared.values import Page, now, stored_labels, update_labels

MIGRATIONS = (
    f"""
{SCHEMA};
CREATE INDEX records_key ON records (key);
CREATE TABLE ingests (
    namespace TEXT NOT NULL, ref TEXT NOT NULL, key TEXT NOT NULL UNIQUE, total INTEGER NOT NULL,
    expected TEXT NOT NULL, started_at TEXT NOT NULL, PRIMARY KEY (namespace, ref)) WITHOUT ROWID
""",
    # expire_at: until when an ingest without a lease is kept, unix time; 0: as long as its lease.
    """
ALTER TABLE ingests ADD COLUMN expire_at INTEGER NOT NULL DEFAULT 0;
UPDATE ingests SET expire_at = unixepoch(started_at) + 86400;
"""
    + f"{migration(CONTENT)};\n{epoch.journal('ingests', repr(INGESTS), 'row.ref', roots=False)}",
    # linked: the size of the blob of another namespace that stands for the ingest's bytes, 0 for none.
    "ALTER TABLE ingests ADD COLUMN linked INTEGER NOT NULL DEFAULT 0",
)
UNLEASED_SECONDS = 24 * 3600
_INGEST = "SELECT ref, total, expected, started_at, linked FROM ingests WHERE namespace = ?"


class Metadata:
    """The rows of the content service."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._blobs = Table(
            database, Info, noun="blob", key=lambda info: info.digest,
            adaptor=lambda info: fields({"digest": info.digest, "size": str(info.size)}, labels=info.labels),
        )  # fmt: skip

    # ---- blobs

    def get(self, namespace: str, digest: str) -> Info:
        """One blob of the namespace. NotFound when it is not in it."""
        return self._blobs.get(namespace, digest)

    def answer(self, namespace: str, digest: str) -> Info:
        """The same for an answer, as it travels. NotFound."""
        return self._blobs.answer(namespace, digest)

    def owners(self, digest: str) -> list[tuple[str, int]]:
        """The namespaces that have a blob, and its size in each."""
        rows = self._database.all("SELECT namespace FROM records WHERE key = ? ORDER BY namespace", (digest,))
        return [(row[0], self.get(row[0], digest).size) for row in rows]

    async def page(self, namespace: str, filters: Sequence[str], after: str, limit: int) -> Page[Info]:
        return await self._blobs.page(namespace, filters, after, limit)

    def known(self, digest: str) -> bool:
        """Whether any namespace has the blob."""
        return self._database.one("SELECT 1 FROM records WHERE key = ? LIMIT 1", (digest,)) is not None

    def digests(self) -> set[str]:
        """The digests of all namespaces."""
        return {row[0] for row in self._database.all("SELECT DISTINCT key FROM records")}

    async def update(self, namespace: str, digest: str, labels: dict[str, str], mask: Sequence[str]) -> Info:
        """Change labels. NotFound; InvalidArgument names a path of the mask that is none."""
        check_mask(mask, ("labels",), ("labels",))

        def change(tx: Transaction) -> Info:
            old = self._blobs.require(tx, namespace, digest)
            merged = update_labels(old.labels, labels, mask or ["labels"])
            new = old.model_copy(update={"labels": merged, "updated_at": now()})
            self._blobs.replace(tx, namespace, new)
            return new

        return await self._database.mutate(change)

    async def delete(self, namespace: str, digest: str) -> None:
        """Forget a blob in one namespace. NotFound."""

        def remove(tx: Transaction) -> None:
            self._blobs.remove(tx, namespace, digest)
            tx.publish("/content/delete", {"digest": digest})

        await self._database.mutate(remove, frees=True)

    async def unless_known(self, digest: str, act: Callable[[], None]) -> None:
        """Run `act` under the lock, if no namespace has the blob."""

        def run(tx: Transaction) -> None:
            if not _known(tx, digest):
                act()

        await self._database.write(run, frees=True)

    async def unknown(self, digests: Callable[[], list[str]]) -> list[str]:
        """Those that no namespace has; `digests` runs in a thread, before the look at the records."""

        def compare(connection: sqlite3.Connection) -> list[str]:
            there = digests()
            known = {row[0] for row in connection.execute("SELECT DISTINCT key FROM records")}
            return [digest for digest in there if digest not in known]

        return await self._database.aside(compare)

    async def remove_unknown(self, digests: Sequence[str], remove: Callable[[str], None]) -> None:
        """Run `remove` under the lock for those that no namespace has."""

        def run(tx: Transaction) -> None:
            for digest in digests:
                if not _known(tx, digest):
                    remove(digest)

        await self._database.write(run, frees=True)

    async def locked(self, act: Callable[[], str]) -> str:
        """Run `act` under the lock."""
        return await self._database.write(lambda tx: act())

    # ---- ingests

    def ingest(self, namespace: str, ref: str) -> Ingest | None:
        """What was announced of an ingest; its offset is known here only where a blob stands for its bytes."""
        row = self._database.one(f"{_INGEST} AND ref = ?", (namespace, ref))
        return _ingest(row) if row else None

    def ingests(self, namespace: str, filters: Sequence[str]) -> list[Ingest]:
        """The ingests of a namespace, in order of their refs."""
        matches = compile_filters(filters)
        rows = self._database.all(f"{_INGEST} ORDER BY ref", (namespace,))
        return [_ingest(row) for row in rows if matches(fields({"ref": row[0]}))]

    def knows_key(self, key: str) -> bool:
        """Whether an ingest has this key."""
        return self._database.one("SELECT 1 FROM ingests WHERE key = ?", (key,)) is not None

    async def open(
        self, namespace: str, key: str, opened: Opened, total: int, expected: str, check: Callable[[], None]
    ) -> Opened:
        """Note an ingest that was opened; what was announced earlier is kept where nothing is announced now."""

        linked = opened.offset if opened.complete else 0
        expire_at = 0 if context.current().lease else int(time.time()) + UNLEASED_SECONDS

        def note(tx: Transaction) -> Opened:
            check()
            tx.execute(
                "INSERT INTO ingests (namespace, ref, key, total, expected, started_at, expire_at, linked) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (namespace, ref) DO UPDATE SET total = CASE excluded.total WHEN 0 THEN total "
                "ELSE excluded.total END, expected = CASE excluded.expected WHEN '' THEN expected "
                "ELSE excluded.expected END, expire_at = CASE excluded.expire_at WHEN 0 THEN expire_at "
                "ELSE excluded.expire_at END, linked = excluded.linked",
                (namespace, opened.ref, key, total, expected, now().isoformat(), expire_at, linked),
            )
            return opened

        return await self._database.mutate(note)

    async def unlink(self, namespace: str, ref: str) -> None:
        """Note that an ingest has bytes of its own."""

        def note(tx: Transaction) -> None:
            tx.execute("UPDATE ingests SET linked = 0 WHERE namespace = ? AND ref = ?", (namespace, ref))

        await self._database.write(note)

    async def refuse(self, error: WherryError) -> None:
        """Raise `error`, unless the request in hand took effect before: then its answer is given again (Replayed)."""

        def fail(tx: Transaction) -> None:
            raise error

        await self._database.mutate(fail)

    async def commit(
        self, namespace: str, ref: str, digest: str, size: int, labels: dict[str, str], place: Callable[[bool], None]
    ) -> Info:
        """Turn an ingest (ref "": one without a row) into a blob. `place(known)` puts the file there; `known`: some
        namespace has the blob.

        NotFound: the ingest was aborted. AlreadyExists: this namespace has the blob; nothing is changed here.
        """

        def turn(tx: Transaction) -> Info:
            if ref and not _forget(tx, namespace, ref):
                raise NotFound(f"ingest {ref!r}: not found")
            known = _known(tx, digest)
            if self._blobs.find(tx, namespace, digest) is not None:
                place(known)
                raise AlreadyExists(f"blob {digest}: already exists")
            at = now()
            info = Info(digest=digest, size=size, labels=stored_labels(labels), created_at=at, updated_at=at)
            self._blobs.insert(tx, namespace, info)
            tx.publish("/content/create", {"digest": digest, "size": size})
            place(known)  # last: what fails before it leaves the file where it was
            return info

        return await self._database.mutate(turn)

    async def forget(self, namespace: str, ref: str, remove: Callable[[], None], *, missing_ok: bool = False) -> None:
        """Forget an ingest. NotFound unless `missing_ok`, which is for what is no request's whole effect."""

        def drop(tx: Transaction) -> None:
            if not _forget(tx, namespace, ref) and not missing_ok:
                raise NotFound(f"ingest {ref!r}: not found")
            remove()

        if missing_ok:
            await self._database.write(drop, frees=True)
        else:
            await self._database.mutate(drop, frees=True)


def _known(tx: Transaction, digest: str) -> bool:
    return tx.one("SELECT 1 FROM records WHERE key = ? LIMIT 1", (digest,)) is not None


def _forget(tx: Transaction, namespace: str, ref: str) -> bool:
    return tx.execute("DELETE FROM ingests WHERE namespace = ? AND ref = ?", (namespace, ref)).rowcount > 0


def _ingest(row: Any) -> Ingest:
    ref, total, expected, started_at, linked = row
    at = datetime.fromisoformat(started_at)
    return Ingest(ref=ref, offset=linked, total=total, expected=expected, started_at=at, updated_at=at)


class IngestRecords:
    """The ingests as the garbage collector sees them."""

    def covers(self, type: str) -> bool:
        return type == INGESTS

    def walk(self, connection: sqlite3.Connection, after: tuple[str, str, str]) -> Iterator[Node]:
        rows = connection.execute(
            "SELECT namespace, ref, expected, expire_at FROM ingests WHERE (namespace, ref) > (?, ?) "
            "ORDER BY namespace, ref",
            after[1:],
        )
        with closing(rows):
            yield from map(_node, rows)

    def find(self, connection: sqlite3.Connection, type: str, namespace: str, key: str) -> Node | None:
        row = connection.execute(
            "SELECT namespace, ref, expected, expire_at FROM ingests WHERE namespace = ? AND ref = ?", (namespace, key)
        ).fetchone()
        return None if row is None else _node(row)

    def remove(self, tx: Transaction, type: str, namespace: str, keys: Sequence[str]) -> int:
        return sum(_forget(tx, namespace, ref) for ref in keys)


def _node(row: Any) -> Node:
    namespace, ref, expected, expire_at = row
    node = Node(INGESTS, namespace, ref, root=expire_at > time.time(), until=float(expire_at))
    if expected:
        node.hard.append((CONTENT, expected))
    return node
