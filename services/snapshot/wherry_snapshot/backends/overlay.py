"""Snapshots as layers of an overlay: a directory `fs` each, and `work` for those that are written to.

Options and their order are containerd's (docs: overlayfs snapshotter); the lower directories stand nearest first.
Lists of over a page are the mounter's to shorten.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

from wherry_shared.api.snapshot import REBASE_LABEL
from wherry_shared.errors import FailedPrecondition
from wherry_shared.values import Mount

from . import REBASE, Check, Snapshot, trees
from .directories import Directories

_OVERLAY_MAGIC = 0x794C7630  # linux/magic.h
_INDEX = Path("/sys/module/overlay/parameters/index")


class OverlayBackend(Directories):
    """`<root>/snapshots/<n>/{fs,work}`. Setting `mount_options`: comma-separated, for every overlay mount."""

    capabilities = frozenset({REBASE})

    def __init__(self, root: Path, settings: Mapping[str, str]) -> None:
        _check_host(root)
        super().__init__(root)
        _check_filesystem(root)
        self._options = [o for o in settings.get("mount_options", "").split(",") if o]
        if _INDEX.exists():
            # The index would tie a layer to the one filesystem and upperdir that it was first mounted with.
            self._options.append("index=off")
        # Lower directory of what has no parent but must keep its whiteouts as an overlay writes them.
        self._empty = root / "empty"
        self._empty.mkdir(exist_ok=True, mode=0o755)

    def tree(self, number: int) -> str:
        return f"{self.snapshots}/{number}/fs"

    def create(self, snapshot: Snapshot, check: Check) -> None:
        self.make(snapshot.number, lambda new: self._fill(new, snapshot))

    def _fill(self, new: str, snapshot: Snapshot) -> None:
        _mkdir(f"{new}/fs", 0o755)
        if snapshot.parents:
            parent = os.lstat(self.tree(snapshot.parents[0]))
            os.chown(f"{new}/fs", parent.st_uid, parent.st_gid)
        if snapshot.kind == "active":
            _mkdir(f"{new}/work", 0o711)

    def mounts(self, snapshot: Snapshot) -> list[Mount]:
        if snapshot.kind == "view":
            return [self._view(snapshot)]
        if not snapshot.parents and REBASE_LABEL not in snapshot.inherited:
            return [_bind(self.tree(snapshot.number), "rw")]
        lower = [self.tree(n) for n in snapshot.parents] or [str(self._empty)]
        own = [f"workdir={self.path(snapshot.number)}/work", f"upperdir={self.tree(snapshot.number)}"]
        return [self._overlay(own, lower)]

    def _view(self, snapshot: Snapshot) -> Mount:
        if len(snapshot.parents) > 1:
            return self._overlay([], [self.tree(n) for n in snapshot.parents])
        return _bind(self.tree(snapshot.parents[0] if snapshot.parents else snapshot.number), "ro")

    def _overlay(self, own: list[str], lower: list[str]) -> Mount:
        options = [*own, "lowerdir=" + ":".join(lower), *self._options]
        return Mount(type="overlay", source="overlay", options=options)

    def rebase(self, number: int, parent: int | None, check: Check) -> None:
        """A root that its layer left as it was made gets the owner that it would have had on its parent.

        A base loses its whiteouts: there is nothing under them, and a bind mount would show them as devices.
        """
        if parent is None:
            trees.remove_whiteouts(self.tree(number), check)
            return
        st, above = os.lstat(self.tree(number)), os.lstat(self.tree(parent))
        if (st.st_uid, st.st_gid) == (0, 0):
            os.chown(self.tree(number), above.st_uid, above.st_gid)


def _bind(source: str, access: str) -> Mount:
    return Mount(type="bind", source=source, options=[access, "rbind"])


def _mkdir(path: str, mode: int) -> None:
    """Make a directory of exactly this mode, whatever the umask."""
    os.mkdir(path)
    os.chmod(path, mode)


def _check_host(root: Path) -> None:
    known = Path("/proc/filesystems").read_text().split()
    if "overlay" not in known:
        raise FailedPrecondition("the kernel has no overlay filesystem (it is not in /proc/filesystems)")
    if any(c in str(root) for c in ',:\\"'):
        raise FailedPrecondition(f"overlay's mount options cannot hold the path {root}: it has one of , : \\ \"")


def _check_filesystem(root: Path) -> None:
    if _magic(root) == _OVERLAY_MAGIC:
        raise FailedPrecondition(f"{root} is on an overlay itself, which cannot hold the upper directory of another")


def _magic(path: Path) -> int:
    """The f_type of statfs(2), its first word, which the standard library does not give."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    return ctypes.c_long.from_buffer(buffer).value
