"""Layers of an overlay: a directory `fs` each, `work` for those that are written to, and the options to mount them.

Options and their order are containerd's (docs: overlayfs snapshotter); the lower directories stand nearest first.
Lists of over a page are the mounter's to shorten.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from wherry_shared.api.snapshot import REBASE_LABEL
from wherry_shared.errors import FailedPrecondition
from wherry_shared.values import Mount

from . import REBASE, Check, Snapshot, trees
from .directories import Directories, has_filesystem, magic

_OVERLAY_MAGIC = 0x794C7630  # linux/magic.h
_INDEX = Path("/sys/module/overlay/parameters/index")
_WORK_MODE = 0o711
_INITIAL_IDS = ["0", "0", str((1 << 32) - 1)]


class Layered(Directories):
    """`<root>/snapshots/<n>/{fs,work}`. Setting `mount_options`: comma-separated, for every overlay mount."""

    capabilities = frozenset({REBASE})

    def __init__(self, root: Path, settings: Mapping[str, str]) -> None:
        check_overlay(root)
        super().__init__(root)
        self.options = mount_options(settings.get("mount_options", ""))
        # Lower directory of what has no parent but must keep its whiteouts as an overlay writes them.
        self.empty = root / "empty"
        self.empty.mkdir(exist_ok=True, mode=0o755)

    def tree(self, number: int) -> str:
        return f"{self.path(number)}/fs"

    def fill(self, new: str, snapshot: Snapshot, owner: tuple[int, int]) -> None:
        """Make what an active snapshot or a view has of its own; owner: of its root (uid, gid)."""
        if snapshot.kind == "active" and not snapshot.parents:
            trees.spread(new)  # a layer comes, thousands of files
        _mkdir(f"{new}/fs", 0o755)
        os.chown(f"{new}/fs", *owner)
        if snapshot.kind == "active":
            _mkdir(f"{new}/work", _WORK_MODE)

    def make_again(self, snapshot: Snapshot, check: Check) -> bool:
        work = f"{self.path(snapshot.number)}/work"
        if not os.path.isdir(self.tree(snapshot.number)):
            self.delete(str(snapshot.number), check)
            return super().make_again(snapshot, check)
        if snapshot.kind == "view" or os.path.isdir(work):
            return False
        _mkdir(work, _WORK_MODE)  # what its owner fsynced below `fs` is there without it, on a btrfs
        return True

    def own_options(self, number: int) -> list[str]:
        """Where an overlay on this snapshot writes."""
        return [f"workdir={self.path(number)}/work", f"upperdir={self.tree(number)}"]

    def is_plain(self, snapshot: Snapshot) -> bool:
        """Whether an active snapshot is its directory: nothing is under it, and nothing will be."""
        return not snapshot.parents and REBASE_LABEL not in snapshot.inherited

    def rebase(self, snapshot: Snapshot, above: tuple[int, int], check: Check) -> None:
        """A root that its layer left as it was made gets the owner that it would have had on its parent, `above`.

        A base loses its whiteouts: there is nothing under them, and a bind mount would show them as devices.
        """
        own = self.tree(snapshot.number)
        if not snapshot.parents:
            trees.remove_whiteouts(own, check)
            return
        st = os.lstat(own)
        if (st.st_uid, st.st_gid) == (0, 0):
            os.chown(own, *above)


def bind(source: str, access: str) -> Mount:
    return Mount(type="bind", source=source, options=[access, "rbind"])


def mount_options(own: str) -> list[str]:
    """The options of every overlay mount: the user's, then what this host needs unless the user said it."""
    options = [o for o in own.split(",") if o]
    said = {o.partition("=")[0] for o in options}
    if "userxattr" not in said and Path("/proc/self/uid_map").read_text().split() != _INITIAL_IDS:
        options.append("userxattr")  # trusted.* attributes are the initial user namespace's alone
    if "index" not in said and _INDEX.exists():
        # The index would tie a layer to the one filesystem and upperdir that it was first mounted with.
        options.append("index=off")
    return options


def _mkdir(path: str, mode: int) -> None:
    """Make a directory of exactly this mode, whatever the umask."""
    os.mkdir(path)
    os.chmod(path, mode)


def check_overlay(root: Path) -> None:
    """Whether overlays can be mounted from directories below `root`, which need not be there. FailedPrecondition."""
    if not has_filesystem("overlay"):
        raise FailedPrecondition("the kernel has no overlay filesystem (it is not in /proc/filesystems)")
    if any(c in str(root) for c in ',:\\"'):
        raise FailedPrecondition(f"overlay's mount options cannot hold the path {root}: it has one of , : \\ \"")
    if magic(root) == _OVERLAY_MAGIC:
        raise FailedPrecondition(f"{root} is on an overlay itself, which cannot hold the upper directory of another")
