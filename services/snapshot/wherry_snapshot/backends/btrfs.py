"""Snapshots as subvolumes of a btrfs: each is a snapshot of its parent, made in a moment whatever the size.

They are named as bind mounts, so that nobody needs to know the device or a subvolume's number. What is committed is
read-only, also where it is still mounted; only a file that was open for writing stays so.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from wherry_shared.api.snapshot import Usage
from wherry_shared.errors import FailedPrecondition, WherryError
from wherry_shared.values import Mount

from . import Check, Snapshot, trees
from .directories import Directories, magic

_BTRFS_MAGIC = 0x9123683E  # linux/magic.h
_ROOT_INODE = 256  # of every subvolume (BTRFS_FIRST_FREE_OBJECTID)
# linux/btrfs.h
_SNAP_CREATE_V2, _SUBVOL_CREATE_V2, _SNAP_DESTROY_V2 = 0x50009417, 0x50009418, 0x5000943F
_GETFLAGS, _SETFLAGS = 0x80089419, 0x4008941A
_READ_ONLY = 1 << 1
_VOLUME = struct.Struct("=qQQ32x4040s")
_FLAGS = struct.Struct("=Q")


class BtrfsBackend(Directories):
    """`<root>/snapshots/<n>`, a subvolume each. A view has an empty directory of its own and shows its parent's.

    No `rebase`: a subvolume stands on its parent from the moment it is made.
    """

    def __init__(self, root: Path, settings: Mapping[str, str]) -> None:
        if magic(root) != _BTRFS_MAGIC:
            raise FailedPrecondition(f"{root} is not on a btrfs")
        super().__init__(root)

    def create(self, snapshot: Snapshot, check: Check) -> None:
        name = f"new-{snapshot.number}"
        if snapshot.kind == "view":
            self.make(snapshot.number, lambda new: os.chmod(new, 0o755))  # noqa: S103 - the root of a container
            return
        try:
            with trees.trusted_directory(self.snapshots) as fd:
                self._make_volume(fd, name, snapshot)
            os.rename(f"{self.snapshots}/{name}", self.path(snapshot.number))
        except BaseException:
            self.delete(name, check=lambda: None)
            raise

    def _make_volume(self, fd: int, name: str, snapshot: Snapshot) -> None:
        if not snapshot.parents:
            _ioctl(fd, _SUBVOL_CREATE_V2, name)
            os.chmod(name, 0o755, dir_fd=fd)  # noqa: S103 - the root of a container, in a directory of mode 0700
            return
        with trees.trusted_directory(self.tree(snapshot.parents[0])) as parent:
            _ioctl(fd, _SNAP_CREATE_V2, name, parent)

    def mounts(self, snapshot: Snapshot) -> list[Mount]:
        shown, access = snapshot.number, "rw"
        if snapshot.kind == "view":
            shown, access = (snapshot.parents or (snapshot.number,))[0], "ro"
        return [Mount(type="bind", source=self.tree(shown), options=[access, "rbind"])]

    def seal(self, snapshot: Snapshot, rebase: bool, check: Check) -> Usage:
        with trees.trusted_directory(self.tree(snapshot.number)) as fd:
            _set_read_only(fd, True)
        return self.usage(snapshot, check)

    def unseal(self, number: int) -> None:
        with suppress(FileNotFoundError), trees.trusted_directory(self.tree(number)) as fd:
            _set_read_only(fd, False)

    def usage(self, snapshot: Snapshot, check: Check) -> Usage:
        origin = self.tree(snapshot.parents[0]) if snapshot.parents else ""
        return trees.measure(self.tree(snapshot.number), check, origin)

    def delete(self, name: str, check: Check) -> None:
        with trees.trusted_directory(self.snapshots) as fd:
            if _is_volume(fd, name):
                with suppress(OSError):  # it has others in it, or is locked: then it is taken apart
                    _destroy(fd, name)
                    return
                with suppress(WherryError, OSError):
                    trees.walk(_opened(fd, name), _Volumes(), check)
            trees.remove(fd, name, check)


class _Volumes(trees.Visitor):
    """Destroys the subvolumes in a tree, the inmost first: whoever can write may have made some."""

    def visit(self, fd: int) -> list[str]:
        with os.scandir(fd) as entries:
            return [e.name for e in entries if e.is_dir(follow_symlinks=False)]

    def entered(self, name: str, fd: int) -> None:
        if os.fstat(fd).st_ino == _ROOT_INODE:
            _set_read_only(fd, False)

    def left(self, name: str, fd: int) -> None:
        if _is_volume(fd, name):
            _destroy(fd, name)


def _opened(parent: int, name: str) -> int:
    """A descriptor of a subvolume, which is made writable."""
    fd = trees.open_directory(parent, name)
    try:
        _set_read_only(fd, False)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _destroy(parent: int, name: str) -> None:
    """Destroy a subvolume that has no others in it; its blocks are freed by the kernel afterwards."""
    os.close(_opened(parent, name))
    _ioctl(parent, _SNAP_DESTROY_V2, name)


def _is_volume(parent: int, name: str) -> bool:
    try:
        st = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return st.st_ino == _ROOT_INODE and stat.S_ISDIR(st.st_mode)


def _ioctl(fd: int, request: int, name: str, source: int = 0) -> None:
    """One of the calls on a name in the directory `fd`. Raises OSError with the name."""
    try:
        fcntl.ioctl(fd, request, bytearray(_VOLUME.pack(source, 0, 0, os.fsencode(name))))
    except OSError as e:
        raise OSError(e.errno, e.strerror, name) from None


def _set_read_only(fd: int, wanted: bool) -> None:
    flags: int = _FLAGS.unpack(fcntl.ioctl(fd, _GETFLAGS, _FLAGS.pack(0)))[0]
    if bool(flags & _READ_ONLY) != wanted:
        fcntl.ioctl(fd, _SETFLAGS, _FLAGS.pack(flags ^ _READ_ONLY))
