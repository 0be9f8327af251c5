"""The rows of the namespace service: one record per namespace; they lie in no namespace themselves."""

from __future__ import annotations

from wherry_shared.api.namespace import Namespace
from wherry_shared.catalog import SCHEMA, Table
from wherry_shared.filters import fields
from wherry_shared.sqlite import Database

MIGRATIONS = (SCHEMA,)


def table(database: Database) -> Table[Namespace]:
    """Every namespace that is known."""
    return Table(
        database,
        Namespace,
        noun="namespace",
        key=lambda namespace: namespace.name,
        adaptor=lambda namespace: fields({"name": namespace.name}, labels=namespace.labels),
    )
