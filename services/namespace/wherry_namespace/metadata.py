"""The rows of the namespace service: one record per namespace, which lie in no namespace themselves; and up to where
the stream of events was read."""

from __future__ import annotations

from wherry_shared.api.namespace import Namespace
from wherry_shared.catalog import SCHEMA, Table
from wherry_shared.filters import fields
from wherry_shared.sqlite import Database, Transaction

MIGRATIONS = (SCHEMA, "CREATE TABLE place (token TEXT NOT NULL); INSERT INTO place VALUES ('')")


def place(database: Database) -> str:
    """The token of the place in the stream up to which it was read; empty before the first time."""
    found: str = database.one("SELECT token FROM place")[0]
    return found


def set_place(tx: Transaction, token: str) -> None:
    tx.execute("UPDATE place SET token = ?", (token,))


def table(database: Database) -> Table[Namespace]:
    """Every namespace that is known."""
    return Table(
        database,
        Namespace,
        noun="namespace",
        key=lambda namespace: namespace.name,
        adaptor=lambda namespace: fields({"name": namespace.name}, labels=namespace.labels),
    )
