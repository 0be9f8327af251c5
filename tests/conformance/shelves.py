"""One snapshotter as a caller sees it: what the suites of the snapshotters act on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from snapshot_rig import House, mounted, tree
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.values import Mount

Write = Callable[[Path], None]


class Shelf:
    """The snapshotter `name` in the namespace `default`."""

    def __init__(self, house: House, name: str, capabilities: frozenset[str]) -> None:
        self.house = house
        self.name = name
        self.capabilities = capabilities
        self.api = self.in_namespace("default")
        self._mounts = 0

    def in_namespace(self, namespace: str) -> Snapshots:
        return self.house.bus.proxy(Snapshots, namespace=namespace)

    def mounted(self, mounts: list[Mount]) -> AbstractContextManager[Path]:
        self._mounts += 1
        return mounted(mounts, self.house.root / f"mnt{self._mounts}")

    async def layer(self, name: str, parent: str, write: Write) -> None:
        """A committed snapshot: what `write` does to its parent."""
        with self.mounted(await self.api.prepare(self.name, f"{name}-key", parent)) as root:
            write(root)
        await self.api.commit(self.name, name, f"{name}-key")

    async def shown(self, parent: str) -> dict[str, Any]:
        """What a view of a committed snapshot shows."""
        with self.mounted(await self.api.view(self.name, "look", parent)) as root:
            found = tree(root)
        await self.api.remove(self.name, "look")
        return found


def put(**files: str) -> Write:
    def write(root: Path) -> None:
        for name, text in files.items():
            (root / name).write_text(text)

    return write
