"""Extracts one layer onto directory descriptors, by the rules of containerd's archive package.

A later entry wins over an earlier one of the same name. Parents' symbolic links are resolved inside the root, the last
component never. Owner, then xattrs, then mode (chown and a write clear setuid), then times; of directories, times last.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from wherry_shared.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unknown,
    WherryError,
)

from . import tar
from .limits import Limits
from .names import clean, join, show
from .parents import Parents, copy_up
from .tar import Entry, Reader
from .tree import DIRECTORY_FLAGS, Tree

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_WHITEOUT = b".wh."
_META = b".wh..wh."  # what AUFS kept for itself; only the opaque marker means something
_OPAQUE = b".wh..wh..opq"

_REASONS: dict[int, type[WherryError]] = {
    errno.ENOSPC: ResourceExhausted, errno.EDQUOT: ResourceExhausted, errno.EMFILE: ResourceExhausted,
    errno.ENFILE: ResourceExhausted, errno.ENOMEM: ResourceExhausted, errno.EMLINK: ResourceExhausted,
    errno.EFBIG: ResourceExhausted, errno.E2BIG: ResourceExhausted,
    errno.EIO: DataLoss,
    errno.EPERM: PermissionDenied, errno.EACCES: PermissionDenied,
    errno.EROFS: FailedPrecondition, errno.EBUSY: FailedPrecondition,
    errno.ENOENT: InvalidArgument, errno.ENOTDIR: InvalidArgument, errno.EISDIR: InvalidArgument,
    errno.ELOOP: InvalidArgument, errno.ENAMETOOLONG: InvalidArgument, errno.EINVAL: InvalidArgument,
    errno.EEXIST: InvalidArgument, errno.ENOTEMPTY: InvalidArgument, errno.ERANGE: InvalidArgument,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """Where a layer goes.

    `overlay`: `root` is an overlay's upper directory, whiteouts become character devices 0:0 and opaque markers
    `trusted.overlay.opaque=y`; otherwise whiteouts are carried out on the tree itself. `parents`: an overlay's lower
    directories, nearest first: directories that the layer only implies look as they do there, and hard links may lead
    there. `standalone`: there are parents, but which is not known yet; a layer that would need them is refused with
    `FailedPrecondition`.
    """

    root: str
    overlay: bool
    parents: tuple[str, ...] = ()
    standalone: bool = False


def extract(reader: Reader, target: Target, limits: Limits) -> int:
    """Extract all entries; returns their number.

    Raises `InvalidArgument` (the archive can be no layer), `ResourceExhausted` (a bound, a full disk, a quota),
    `FailedPrecondition` (see `Target.standalone`), `PermissionDenied`, `NotFound` (the root or a parent). What has been
    extracted by then stays: the caller throws the snapshot away.
    """
    parents = Parents(target.parents if target.overlay else ())
    try:
        tree = Tree(target.root, parents, limits, overlay=target.overlay, standalone=target.standalone)
        try:
            Extractor(reader, tree, target, limits).run()
        finally:
            tree.close()
    finally:
        parents.close()
    return reader.count


class Extractor:
    """One layer on its way to one tree."""

    def __init__(self, reader: Reader, tree: Tree, target: Target, limits: Limits) -> None:
        self._reader = reader
        self._tree = tree
        self._target = target
        self._max_path = limits.max_path
        self._owner = os.geteuid(), tree.group
        self._makers: dict[bytes, Callable[[Entry, bytes, bytes, int], None]] = {
            tar.REGULAR: self._file,
            tar.DIRECTORY: self._directory,
            tar.SYMLINK: self._symlink,
            tar.LINK: self._link,
            tar.CHAR: self._node,
            tar.BLOCK_DEVICE: self._node,
            tar.FIFO: self._node,
        }

    def run(self) -> None:
        """Extract every entry, then set the directories' times."""
        entry = None
        try:
            while (entry := self._reader.next()) is not None:
                self.extract(entry)
            self._tree.apply_times()
        except OSError as error:
            raise _typed(error, entry) from error

    def extract(self, entry: Entry) -> None:
        """Extract one entry, whose body comes next from the reader."""
        name = entry.name
        directory, _, base = name.rpartition(b"/")
        tree = self._tree
        fd = tree.opened.get(directory)
        if fd is None:
            directory, fd = tree.enter(directory)
            name = join(directory, base)
            if len(name) > self._max_path:
                raise ResourceExhausted(f"{show(entry.name)} leads to a path of {len(name)} bytes")
        if base[:4] == _WHITEOUT:
            self._whiteout(entry, name, base, fd)
        elif base:  # the root itself is no entry: it is the snapshotter's
            self._makers[entry.kind](entry, name, base, fd)
            if tree.seen is not None:
                tree.seen.add(name)
            else:
                tree.lent.discard(name)

    def _whiteout(self, entry: Entry, name: bytes, base: bytes, fd: int) -> None:
        directory = name.rpartition(b"/")[0]
        if base == _OPAQUE:
            self._tree.opaque(fd, directory)
        elif not base.startswith(_META):
            hidden = base[len(_WHITEOUT) :]
            if hidden in (b"", b".", b".."):
                raise InvalidArgument(f"the whiteout {show(entry.name)} names nothing in its directory")
            self._tree.whiteout(fd, join(directory, hidden), hidden, (entry.uid, entry.gid))

    def _file(self, entry: Entry, name: bytes, base: bytes, directory: int) -> None:
        try:
            fd = os.open(base, _CREATE, 0o600, dir_fd=directory)
        except FileExistsError:
            self._tree.remove(directory, name, base)
            fd = os.open(base, _CREATE, 0o600, dir_fd=directory)
        try:
            if entry.segments is not None:
                self._holes(fd, entry)
            elif entry.size:
                self._body(fd, entry.size)
            if (entry.uid, entry.gid) != self._owner or directory in self._tree.foreign:
                os.fchown(fd, entry.uid, entry.gid)
            if entry.xattrs:
                _set_xattrs(fd, entry)
            os.fchmod(fd, entry.mode)
            os.utime(fd, ns=(entry.atime, entry.mtime))
        finally:
            os.close(fd)

    def _body(self, fd: int, size: int) -> None:
        """Write `size` bytes of the body, straight from the decompressor's buffer."""
        reader = self._reader
        while size:
            piece = reader.take(size)
            size -= len(piece)
            written = os.write(fd, piece)
            while written < len(piece):
                piece = piece[written:]
                written = os.write(fd, piece)

    def _holes(self, fd: int, entry: Entry) -> None:
        for offset, length in entry.segments or ():
            os.lseek(fd, offset, os.SEEK_SET)
            self._body(fd, length)
        os.ftruncate(fd, entry.size)

    def _directory(self, entry: Entry, name: bytes, base: bytes, parent: int) -> None:
        """Create it, or give an existing directory the entry's attributes."""
        tree = self._tree
        try:
            os.mkdir(base, 0o700, dir_fd=parent)
            fd = os.open(base, DIRECTORY_FLAGS, dir_fd=parent)
            tree.keep(name, fd)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(base, dir_fd=parent, follow_symlinks=False).st_mode):
                fd = tree.enter(name)[1]
            else:
                fd = tree.make_directory(parent, name, base)
        os.fchown(fd, entry.uid, entry.gid)
        if entry.xattrs:
            _set_xattrs(fd, entry)
        os.fchmod(fd, entry.mode)
        if entry.gid != tree.group:
            tree.foreign.add(fd)
        else:
            tree.foreign.discard(fd)
        tree.times[name] = entry.atime, entry.mtime

    def _symlink(self, entry: Entry, name: bytes, base: bytes, directory: int) -> None:
        if not entry.link or b"\0" in entry.link:
            raise InvalidArgument(f"the target {show(entry.link)} of the symbolic link {show(name)} can be no path")
        try:
            os.symlink(entry.link, base, dir_fd=directory)
        except FileExistsError:
            self._tree.remove(directory, name, base)
            os.symlink(entry.link, base, dir_fd=directory)
        if (entry.uid, entry.gid) != self._owner or directory in self._tree.foreign:
            os.chown(base, entry.uid, entry.gid, dir_fd=directory, follow_symlinks=False)
        if entry.xattrs:
            _set_xattrs(b"/proc/self/fd/%d/%b" % (directory, base), entry)
        os.utime(base, ns=(entry.atime, entry.mtime), dir_fd=directory, follow_symlinks=False)

    def _node(self, entry: Entry, name: bytes, base: bytes, directory: int) -> None:
        """Create a device or a fifo."""
        kind = {tar.CHAR: stat.S_IFCHR, tar.BLOCK_DEVICE: stat.S_IFBLK, tar.FIFO: stat.S_IFIFO}[entry.kind]
        device = os.makedev(*entry.device) if entry.device else 0
        try:
            os.mknod(base, kind | 0o600, device, dir_fd=directory)
        except FileExistsError:
            self._tree.remove(directory, name, base)
            os.mknod(base, kind | 0o600, device, dir_fd=directory)
        _set_attributes(entry, base, directory)

    def _link(self, entry: Entry, name: bytes, base: bytes, directory: int) -> None:
        """A hard link, never to what a symbolic link points to."""
        tree = self._tree
        target = self._link_target(entry, name)
        at, _, last = target.rpartition(b"/")
        source = tree.enter(at)[1]
        directory = tree.enter(name.rpartition(b"/")[0])[1]  # of all directories these two now stay open for certain
        try:
            os.link(last, base, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
        except FileExistsError:
            tree.remove(directory, name, base)
            os.link(last, base, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
        _set_attributes(entry, base, directory)

    def _link_target(self, entry: Entry, name: bytes) -> bytes:
        """The canonical path of what a hard link leads to, copied up if only the parents have it."""
        tree, link = self._tree, entry.link
        path, _, last = (link if b".." in link else clean(link)).rpartition(b"/")
        if last in (b"", b".", b"..") or b"\0" in link:
            raise InvalidArgument(f"the hard link {show(name)} leads to {show(link)}, which can be no file")
        at, fd, missing = tree.resolve(path)
        target = b"/".join([*([at] if at else []), *missing, last])
        if (target + b"/").startswith(name + b"/"):
            raise InvalidArgument(f"the hard link {show(name)} leads to {show(link)}, in place of which it stands")
        info = None if missing else tree.look(fd, last)
        if info is None:
            removed = tree.is_taken(fd, missing[0] if missing else last)
            self._copy_up(entry, target, removed=removed)
            tree.lent.add(target)
        elif stat.S_ISDIR(info.st_mode):
            raise InvalidArgument(f"the hard link {show(name)} leads to the directory {show(link)}")
        return target

    def _copy_up(self, entry: Entry, target: bytes, *, removed: bool) -> None:
        """Bring the target of a hard link up from the parents, unless this layer removed it there."""
        if self._target.standalone and not removed:
            raise FailedPrecondition(f"the layer needs its parent: its hard link {show(entry.name)} leads there")
        model = None if removed else self._tree.below(target)
        if model is None:
            raise InvalidArgument(f"the hard link {show(entry.name)} leads to {show(entry.link)}, which is not there")
        try:
            directory, _, base = target.rpartition(b"/")
            copy_up(model, self._tree.enter(directory)[1], base)
        finally:
            os.close(model)


def _set_xattrs(where: int | bytes, entry: Entry) -> None:
    """Set the entry's xattrs on a descriptor or on a path that is not followed.

    Not every file system knows every xattr, and only files and directories have user.*: both are no errors.
    """
    follow = isinstance(where, int)
    for name, value in entry.xattrs or ():
        try:
            os.setxattr(where, name, value, follow_symlinks=follow)
        except OSError as error:
            unfit = name.startswith(b"user.") and entry.kind not in (tar.REGULAR, tar.DIRECTORY)
            if error.errno != errno.ENOTSUP and not (error.errno == errno.EPERM and unfit):
                raise


def _set_attributes(entry: Entry, base: bytes, directory: int) -> None:
    """Owner, xattrs, mode and times of a device, a fifo or a hard link (to anything), which is not opened for that."""
    fd = os.open(base, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        path = b"/proc/self/fd/%d" % fd
        os.chown(path, entry.uid, entry.gid)
        if entry.xattrs:
            _set_xattrs(b"/proc/self/fd/%d/%b" % (directory, base), entry)
        if not stat.S_ISLNK(os.fstat(fd).st_mode):
            os.chmod(path, entry.mode)
        os.utime(path, ns=(entry.atime, entry.mtime))
    finally:
        os.close(fd)


def _typed(error: OSError, entry: Entry | None) -> WherryError:
    """The error of ours that a system call's error is."""
    where = f"{show(entry.name)} cannot be extracted" if entry else "the layer cannot be extracted"
    return _REASONS.get(error.errno or 0, Unknown)(f"{where}: {error.strerror}")
