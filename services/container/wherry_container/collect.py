"""The container service's part in garbage collections."""

from __future__ import annotations

from wherry_shared.api.gc import ContainerCollection
from wherry_shared.collectable import Collection, Records
from wherry_shared.references import CONTAINERS, SNAPSHOTS, Node, some_fields
from wherry_shared.sqlite import Database

_WANTED = frozenset({"labels", "snapshotter", "snapshot_key"})


class ContainerCollector(Collection, ContainerCollection):
    """A container is a root, and keeps its snapshot and what its labels name. None is ever dead."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, [Records(CONTAINERS, _describe)])


def _describe(node: Node, document: bytes) -> None:
    record = some_fields(document, _WANTED)  # a specification is ten times as large, and skipped
    node.root = True
    if snapshotter := record.get("snapshotter", ""):
        node.hard.append((SNAPSHOTS + snapshotter, record.get("snapshot_key", "")))
    node.refer(record.get("labels", {}))
