"""Snapshots as whole directories: each is a copy of its parent, for where there is no overlay.

On btrfs and xfs a copy shares its blocks with the parent and costs only inodes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from wherry_shared.values import Mount

from . import Check, Snapshot
from .copying import copy_tree
from .directories import Directories, to_the_end


class NativeBackend(Directories):
    """`<root>/snapshots/<n>`. A view has an empty directory of its own and shows its parent's.

    No `rebase`: whiteouts would have to be kept somewhere, and a merge at commit costs as much as the copy does now.
    """

    copies = True

    def __init__(self, root: Path, settings: Mapping[str, str]) -> None:
        super().__init__(root)

    def create(self, snapshot: Snapshot, check: Check) -> None:
        self.make(snapshot.number, lambda new: self._fill(new, snapshot, check))

    def _fill(self, new: str, snapshot: Snapshot, check: Check) -> None:
        os.chmod(new, 0o755)  # noqa: S103 - the root of a container, in a directory of mode 0700
        if snapshot.kind == "view" or not snapshot.parents:
            return
        links = f"{new}-links"
        os.mkdir(links, 0o700)
        try:
            copy_tree(self.tree(snapshot.parents[0]), new, links, check)
        finally:
            self.delete(os.path.basename(links), to_the_end)

    def mounts(self, snapshot: Snapshot) -> list[Mount]:
        shown, access = snapshot.number, "rw"
        if snapshot.kind == "view":
            shown, access = (snapshot.parents or (snapshot.number,))[0], "ro"
        return [Mount(type="bind", source=self.tree(shown), options=[access, "rbind"])]
