"""One contract and its models per service; docs/wire.txt is generated from them."""

from __future__ import annotations

from typing import Any

from ..records import RECORDS
from ..values import Model


def contracts() -> list[Any]:
    """Every contract of the house, in alphabetical order of their services."""
    from .container import Containers
    from .content import Content
    from .diff import Diff
    from .events import Events
    from .image import Images
    from .introspection import Introspection
    from .lease import Leases
    from .namespace import Namespaces
    from .snapshot import Snapshots
    from .task import Tasks

    found: list[Any] = [
        Containers, Content, Diff, Events, Images, Introspection, Leases, Namespaces, Snapshots, Tasks,
    ]  # fmt: skip
    return found


def build() -> None:
    """Build the codecs of every contract and model now, and not at the first call: for a process that forks services.

    It takes some 50 ms, which each service would otherwise spend on its first calls, in memory of its own.
    """
    endpoints = [e for contract in (*contracts(), *second_contracts()) for e in contract.endpoints.values()]
    todo: list[type[Any]] = [*(endpoint.request for endpoint in endpoints), Model]
    while todo:
        model = todo.pop()
        todo += model.__subclasses__()
        model.model_rebuild()
    for kind in RECORDS:
        kind.model_rebuild()
    for endpoint in endpoints:  # which take those of the models
        endpoint.build()


def second_contracts() -> list[Any]:
    """Those that a service's process serves beside its own, for other services."""
    from .gc import Collections, ContainerCollection, ContentCollection, ImageCollection, SnapshotCollection

    return [Collections, ContainerCollection, ContentCollection, ImageCollection, SnapshotCollection]
