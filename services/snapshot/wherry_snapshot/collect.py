"""The snapshot service's part in garbage collections."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from wherry_shared.api.gc import SnapshotCollection
from wherry_shared.collectable import Collection

from .metadata import Rows, SnapshotRecords
from .snapshotter import Snapshotter


class SnapshotCollector(Collection, SnapshotCollection):
    """A snapshot keeps its parent, and what its labels name. Directories go by each snapshotter's own cleanup."""

    def __init__(self, rows: Rows, snapshotters: Mapping[str, Snapshotter]) -> None:
        async def reap() -> None:
            await asyncio.gather(*(snapshotter.cleanup() for snapshotter in snapshotters.values()))

        super().__init__(rows.database, [SnapshotRecords()], reap)
