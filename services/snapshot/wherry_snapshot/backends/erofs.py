"""Snapshots as layers of an overlay, of which each committed one is an EROFS image: one file, read-only by nature.

What stands on images is told as containerd tells it: the images, the nearest first, and then a mount of type
`format/overlay`, in whose options `{{ overlay 0 N }}` stands for the places where the mounter put the images 0 to N.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from wherry_shared.api.snapshot import Usage
from wherry_shared.values import Mount

from . import Check, Snapshot, mkfs, trees
from .directories import to_the_end
from .layered import Layered, bind


class ErofsBackend(Layered):
    """`<root>/snapshots/<n>/{fs,work}` while it is active, `<n>/layer.erofs` when it is committed."""

    def __init__(self, root: Path, settings: Mapping[str, str]) -> None:
        super().__init__(root, settings)
        mkfs.check_host(root)

    def image(self, number: int) -> str:
        return f"{self.path(number)}/layer.erofs"

    def create(self, snapshot: Snapshot, check: Check) -> None:
        owner = self._owner(snapshot.parents[0]) if snapshot.parents else (0, 0)
        self.make(snapshot.number, lambda new: self.fill(new, snapshot, owner))

    def _owner(self, parent: int) -> tuple[int, int]:
        """Of a committed snapshot's root: the image's own file has it."""
        st = os.lstat(self.image(parent))
        return st.st_uid, st.st_gid

    def mounts(self, snapshot: Snapshot) -> list[Mount]:
        images = [Mount(type="erofs", source=self.image(n), options=["ro"]) for n in snapshot.parents]
        lower = f"lowerdir={{{{ overlay 0 {len(images) - 1} }}}}"
        if snapshot.kind == "view":
            if not images:
                return [bind(self.tree(snapshot.number), "ro")]
            return images if len(images) == 1 else [*images, _overlay("format/overlay", [lower, *self.options])]
        if self.is_plain(snapshot):
            return [bind(self.tree(snapshot.number), "rw")]
        own = self.own_options(snapshot.number)
        if not images:
            return [_overlay("overlay", [*own, f"lowerdir={self.empty}", *self.options])]
        return [*images, _overlay("format/overlay", [*own, lower, *self.options])]

    def seal(self, snapshot: Snapshot, rebase: bool, check: Check) -> Usage:
        if rebase:
            self.rebase(snapshot, self._owner(snapshot.parents[0]) if snapshot.parents else (0, 0), check)
        number = snapshot.number
        unfinished = f"{self.image(number)}.new"
        mkfs.make_image(self.tree(number), unfinished, check)
        root = os.lstat(self.tree(number))
        os.chown(unfinished, root.st_uid, root.st_gid)
        os.chmod(unfinished, 0o400)
        os.rename(unfinished, self.image(number))
        return Usage(size=os.lstat(self.image(number)).st_blocks * trees.BLOCK, inodes=1)

    def unseal(self, number: int) -> None:
        for image in (self.image(number), f"{self.image(number)}.new"):
            with suppress(FileNotFoundError):
                os.unlink(image)

    def settle(self, number: int) -> None:
        if not os.path.exists(self.image(number)):
            return  # then the directory is all that there is
        with trees.trusted_directory(self.path(number)) as fd:
            for name in ("fs", "work"):
                trees.remove(fd, name, to_the_end)


def _overlay(kind: str, options: list[str]) -> Mount:
    return Mount(type=kind, source="overlay", options=options)
