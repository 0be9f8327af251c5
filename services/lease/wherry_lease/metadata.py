"""The rows of the lease service: leases, the times at which they are void, and what they keep."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

from wherry_shared import epoch
from wherry_shared.api.lease import Lease, Resource
from wherry_shared.catalog import SCHEMA, Table
from wherry_shared.collectable import Records, migration
from wherry_shared.contract import unpack
from wherry_shared.filters import fields
from wherry_shared.references import FLAT, LEASES, Node, expires_at
from wherry_shared.sqlite import Database, Transaction

# The key's columns come first: SQLite 3.40's own check takes any other order in a WITHOUT ROWID table for damage.
MIGRATIONS = (
    f"""{SCHEMA};
CREATE TABLE expiries (
    namespace TEXT NOT NULL, lease TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY (namespace, lease)) WITHOUT ROWID;
CREATE INDEX expiries_at ON expiries (at);
CREATE TABLE resources (
    namespace TEXT NOT NULL, lease TEXT NOT NULL, type TEXT NOT NULL, id TEXT NOT NULL,
    PRIMARY KEY (namespace, lease, type, id)) WITHOUT ROWID
""",
    f"""{migration(LEASES)};
{epoch.journal("resources", repr(LEASES), "row.lease", roots=False)}
""",
)
_BY_PAGE = "SELECT type, id FROM resources WHERE namespace = ? AND lease = ? AND (type, id) > (?, ?) "
_BY_PAGE += "ORDER BY type, id LIMIT ?"


class Rows:
    """Leases by (namespace, id), each with its resources."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.leases = Table(
            database,
            Lease,
            noun="lease",
            key=lambda lease: lease.id,
            adaptor=lambda lease: fields({"id": lease.id}, labels=lease.labels),
        )

    def insert(self, tx: Transaction, namespace: str, lease: Lease, expires: datetime | None) -> None:
        """Add a lease. AlreadyExists when its id is taken."""
        self.leases.insert(tx, namespace, lease)
        if expires is not None:
            tx.execute("INSERT INTO expiries VALUES (?, ?, ?)", (namespace, lease.id, _milliseconds(expires)))

    def remove(self, tx: Transaction, namespace: str, id: str) -> None:
        """Take a lease out with what it keeps. NotFound when it is not there."""
        self.leases.remove(tx, namespace, id)
        tx.execute("DELETE FROM expiries WHERE namespace = ? AND lease = ?", (namespace, id))
        tx.execute("DELETE FROM resources WHERE namespace = ? AND lease = ?", (namespace, id))

    def expired(self, at: datetime, limit: int) -> list[tuple[str, str]]:
        """Namespace and id of up to `limit` leases that are void at that time."""
        return self.database.all(
            "SELECT namespace, lease FROM expiries WHERE at <= ? ORDER BY at LIMIT ?", (_milliseconds(at), limit)
        )

    def add_resource(self, tx: Transaction, namespace: str, id: str, resource: Resource) -> None:
        tx.execute(
            "INSERT INTO resources VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (namespace, id, resource.type, resource.id),
        )

    def delete_resource(self, tx: Transaction, namespace: str, id: str, resource: Resource) -> None:
        tx.execute(
            "DELETE FROM resources WHERE namespace = ? AND lease = ? AND type = ? AND id = ?",
            (namespace, id, resource.type, resource.id),
        )

    def deleted(self, tx: Transaction) -> None:
        """Note that a collection may find something."""
        tx.execute(epoch.DELETED)

    def resources(self, namespace: str, id: str, after: tuple[str, str], limit: int) -> list[Resource]:
        """What a lease keeps behind (type, id), in order of these."""
        rows = self.database.all(_BY_PAGE, (namespace, id, *after, limit))
        return [Resource(type=type_, id=name) for type_, name in rows]


class LeaseRecords:
    """The leases as the garbage collector sees them, with what they keep. The sweep of leases removes them, not it."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._records = Records(LEASES, self._describe)

    def covers(self, type: str) -> bool:
        return type == LEASES

    def walk(self, connection: sqlite3.Connection, after: tuple[str, str, str]) -> Iterator[Node]:
        for node in self._records.walk(connection, after):
            yield self._complete(connection, node)

    def find(self, connection: sqlite3.Connection, type: str, namespace: str, key: str) -> Node | None:
        node = self._records.find(connection, type, namespace, key)
        return node and self._complete(connection, node)

    def remove(self, tx: Transaction, type: str, namespace: str, keys: Sequence[str]) -> int:
        return 0

    def _describe(self, node: Node, document: bytes) -> None:
        labels = unpack(document).get("labels", {})
        expires = expires_at(labels)
        node.root = expires is None or expires > self._clock()
        node.flat = FLAT in labels

    def _complete(self, connection: sqlite3.Connection, node: Node) -> Node:
        if node.root:
            node.hard += connection.execute(
                "SELECT type, id FROM resources WHERE namespace = ? AND lease = ?", (node.namespace, node.key)
            ).fetchall()
        return node


def _milliseconds(at: datetime) -> int:
    """Unix time as it stands in `expiries`."""
    return int(at.timestamp() * 1000)
