"""Snapshots as layers of an overlay: a directory `fs` each, and `work` for those that are written to.

Options and their order are containerd's (docs: overlayfs snapshotter); the lower directories stand nearest first.
Lists of over a page are the mounter's to shorten.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from wherry_shared.api.snapshot import REBASE_LABEL, UPPERDIR_LABEL, Usage
from wherry_shared.errors import FailedPrecondition
from wherry_shared.values import Mount

from . import REBASE, REMAP_IDS, Check, Snapshot, idmap, trees
from .directories import Directories, magic

_OVERLAY_MAGIC = 0x794C7630  # linux/magic.h
_INDEX = Path("/sys/module/overlay/parameters/index")
_INITIAL_IDS = ["0", "0", str((1 << 32) - 1)]


class OverlayBackend(Directories):
    """`<root>/snapshots/<n>/{fs,work}`.

    Settings: `mount_options`, comma-separated, for every overlay mount; `upperdir_label`, `true` to tell of each
    snapshot's `fs` in the label UPPERDIR_LABEL.
    """

    capabilities = frozenset({REBASE})

    def __init__(self, root: Path, settings: Mapping[str, str]) -> None:
        check_overlay(root)
        super().__init__(root)
        self._options = mount_options(settings.get("mount_options", ""))
        self._tell = settings.get("upperdir_label", "") == "true"
        # Lower directory of what has no parent but must keep its whiteouts as an overlay writes them.
        self._empty = root / "empty"
        self._empty.mkdir(exist_ok=True, mode=0o755)
        if idmap.works_on(self.snapshots):
            self.capabilities = self.capabilities | {REMAP_IDS}

    def tree(self, number: int) -> str:
        return f"{self.snapshots}/{number}/fs"

    def create(self, snapshot: Snapshot, check: Check) -> None:
        mapping = self._mapping(snapshot)
        self.make(snapshot.number, lambda new: self._fill(new, snapshot, mapping))

    def _mapping(self, snapshot: Snapshot) -> idmap.Mapping | None:
        mapping = idmap.of(snapshot.inherited)
        if mapping is not None and REMAP_IDS not in self.capabilities:
            raise FailedPrecondition(f"the kernel cannot map ids of files in {self.snapshots}")
        return mapping

    def _fill(self, new: str, snapshot: Snapshot, mapping: idmap.Mapping | None) -> None:
        _mkdir(f"{new}/fs", 0o755)
        if mapping is not None:
            os.chown(f"{new}/fs", *mapping.root)
        elif snapshot.parents:
            parent = os.lstat(self.tree(snapshot.parents[0]))
            os.chown(f"{new}/fs", parent.st_uid, parent.st_gid)
        if snapshot.kind == "active":
            _mkdir(f"{new}/work", 0o711)

    def mounts(self, snapshot: Snapshot) -> list[Mount]:
        if snapshot.kind == "view":
            return [self._view(snapshot)]
        if not snapshot.parents and REBASE_LABEL not in snapshot.inherited:
            return [bind(self.tree(snapshot.number), "rw")]
        lower = [self.tree(n) for n in snapshot.parents] or [str(self._empty)]
        own = [f"workdir={self.path(snapshot.number)}/work", f"upperdir={self.tree(snapshot.number)}"]
        return [self._overlay(snapshot, own, lower)]

    def _view(self, snapshot: Snapshot) -> Mount:
        if len(snapshot.parents) > 1:
            return self._overlay(snapshot, [], [self.tree(n) for n in snapshot.parents])
        return bind(self.tree(snapshot.parents[0] if snapshot.parents else snapshot.number), "ro")

    def _overlay(self, snapshot: Snapshot, own: list[str], lower: list[str]) -> Mount:
        mapping = idmap.of(snapshot.inherited)
        ids = [] if mapping is None else [f"uidmap={mapping.uids}", f"gidmap={mapping.gids}"]
        options = [*ids, *own, "lowerdir=" + ":".join(lower), *self._options]
        return Mount(type="overlay", source="overlay", options=options)

    def seal(self, snapshot: Snapshot, rebase: bool, check: Check) -> Usage:
        if rebase:
            self._rebase(snapshot, check)
        return self.usage(snapshot, check)

    def _rebase(self, snapshot: Snapshot, check: Check) -> None:
        """A root that its layer left as it was made gets the owner that it would have had on its parent.

        A base loses its whiteouts: there is nothing under them, and a bind mount would show them as devices.
        """
        own = self.tree(snapshot.number)
        if not snapshot.parents:
            trees.remove_whiteouts(own, check)
            return
        st, above = os.lstat(own), os.lstat(self.tree(snapshot.parents[0]))
        if (st.st_uid, st.st_gid) == (0, 0):
            os.chown(own, above.st_uid, above.st_gid)

    def shown_labels(self, number: int) -> Mapping[str, str]:
        return {UPPERDIR_LABEL: self.tree(number)} if self._tell else {}


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
    known = Path("/proc/filesystems").read_text().split()
    if "overlay" not in known:
        raise FailedPrecondition("the kernel has no overlay filesystem (it is not in /proc/filesystems)")
    if any(c in str(root) for c in ',:\\"'):
        raise FailedPrecondition(f"overlay's mount options cannot hold the path {root}: it has one of , : \\ \"")
    if magic(root) == _OVERLAY_MAGIC:
        raise FailedPrecondition(f"{root} is on an overlay itself, which cannot hold the upper directory of another")
