"""The rows of the container service: one record per container."""

from __future__ import annotations

from wherry_shared.api.container import Container
from wherry_shared.catalog import SCHEMA, Table
from wherry_shared.collectable import migration
from wherry_shared.filters import Adaptor, fields
from wherry_shared.references import CONTAINERS
from wherry_shared.sqlite import Database

MIGRATIONS = (SCHEMA, migration(CONTAINERS))


def table(database: Database) -> Table[Container]:
    """The containers of every namespace."""
    return Table(database, Container, noun="container", key=lambda container: container.id, adaptor=_fields)


def _fields(container: Container) -> Adaptor:
    values = {"id": container.id, "image": container.image, "runtime.name": container.runtime.name}
    return fields(values, labels=container.labels)
