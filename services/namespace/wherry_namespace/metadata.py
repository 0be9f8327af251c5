"""The rows of the namespace service: one record per namespace, which lie in no namespace themselves; and up to where
the stream of events was read."""

from __future__ import annotations

from wherry_shared.api.namespace import Namespace
from wherry_shared.catalog import SCHEMA, Table
from wherry_shared.filters import fields
from wherry_shared.sqlite import Database

MIGRATIONS = (SCHEMA, "CREATE TABLE place (token TEXT NOT NULL); INSERT INTO place VALUES ('')")


def table(database: Database) -> Table[Namespace]:
    """Every namespace that is known."""
    return Table(
        database,
        Namespace,
        noun="namespace",
        key=lambda namespace: namespace.name,
        adaptor=lambda namespace: fields({"name": namespace.name}, labels=namespace.labels),
    )
