"""A tree copied with everything that is in it, sharing its blocks where the filesystem can.

Kept: owners, modes with setuid and sticky bits, extended attributes with ACLs and capabilities, times, hard links,
devices, FIFOs, sockets, symbolic links as they stand, holes. The source is hostile and read by descriptors only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from . import Check
from .trees import BLOCK, Descent, Visitor, trusted_directory, walk

CHUNK = 8 << 20
_FICLONE = 0x40049409  # linux/fs.h
_NO_REFLINK = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS})
_NO_RANGE = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS})
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_tree(source: str, target: str, links: str, check: Check) -> None:
    """Copy the tree `source` over the empty directory `target`, with the attributes of its root.

    links: an empty directory on the same filesystem, where each file with several names gets one more while the copy
    is under way; the caller removes it. Raises OSError; what was copied until then stays.
    """
    with trusted_directory(source) as origin, trusted_directory(links) as names, trusted_directory(target) as copy:
        visitor = _Copy(os.dup(copy), names, check)
        try:
            walk(os.dup(origin), visitor, check)
        finally:
            visitor.close()


class _Copy(Visitor):
    """Walks the source; its own Descent keeps the same place in the copy."""

    def __init__(self, target: int, links: int, check: Check) -> None:
        self._place = Descent(target)
        self._links = links
        self._linked: set[int] = set()
        self._check = check
        self._files = _Files(check)

    def close(self) -> None:
        self._place.close()

    def visit(self, fd: int) -> list[str]:
        below = []
        with os.scandir(fd) as entries:
            for entry in entries:
                self._check()
                try:
                    if self._copy(fd, entry.name):
                        below.append(entry.name)
                except FileNotFoundError:
                    continue  # gone from a source that should stand still: then its row goes, and this copy with it
        return below

    def entered(self, name: str, fd: int) -> None:
        os.mkdir(name, 0o700, dir_fd=self._place.fd)
        self._place.enter(name)

    def leaving(self, fd: int) -> None:
        _dress(fd, self._place.fd)

    def left(self, name: str, fd: int) -> None:
        self._place.leave()

    def _copy(self, fd: int, name: str) -> bool:
        """Copy one entry; True: it is a directory, which the walk copies."""
        held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        try:
            st = os.fstat(held)
            if stat.S_ISDIR(st.st_mode):
                return True
            if st.st_nlink == 1 or not self._link(st.st_ino, name):
                self._make(fd, held, name, st)
        finally:
            os.close(held)
        return False

    def _link(self, inode: int, name: str) -> bool:
        """Whether the file is copied already under another name, and has this one now too."""
        if inode not in self._linked:
            return False
        os.link(str(inode), name, src_dir_fd=self._links, dst_dir_fd=self._place.fd, follow_symlinks=False)
        return True

    def _make(self, fd: int, held: int, name: str, st: os.stat_result) -> None:
        target = self._place.fd
        if stat.S_ISREG(st.st_mode):
            self._files.copy(held, target, name, st)
        else:
            if stat.S_ISLNK(st.st_mode):
                os.symlink(os.readlink("", dir_fd=held), name, dir_fd=target)
            else:
                os.mknod(name, st.st_mode, st.st_rdev, dir_fd=target)
            _dress_special(fd, target, name, st)
        if st.st_nlink > 1:
            os.link(name, str(st.st_ino), src_dir_fd=target, dst_dir_fd=self._links, follow_symlinks=False)
            self._linked.add(st.st_ino)


class _Files:
    """Copies regular files; remembers what the filesystem does not know how to do."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._reflink = True
        self._range = True

    def copy(self, held: int, directory: int, name: str, st: os.stat_result) -> None:
        source = os.open(f"/proc/self/fd/{held}", _READ)
        try:
            target = os.open(name, _WRITE, 0o600, dir_fd=directory)
            try:
                self._bytes(source, target, st)
                _dress(source, target)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _bytes(self, source: int, target: int, st: os.stat_result) -> None:
        if st.st_size == 0 or self._cloned(source, target):
            return
        if st.st_blocks * BLOCK >= st.st_size:
            self._extent(source, target, 0, st.st_size)
        else:
            self._extents(source, target, st.st_size)

    def _cloned(self, source: int, target: int) -> bool:
        if self._reflink:
            try:
                fcntl.ioctl(target, _FICLONE, source)
            except OSError as e:
                if e.errno not in _NO_REFLINK:
                    raise
                self._reflink = False
        return self._reflink

    def _extents(self, source: int, target: int, size: int) -> None:
        """Copy a file with holes: only where it has data."""
        at = 0
        while at < size:
            try:
                start = os.lseek(source, at, os.SEEK_DATA)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise
                break
            at = os.lseek(source, start, os.SEEK_HOLE)
            self._extent(source, target, start, at)
        os.ftruncate(target, size)

    def _extent(self, source: int, target: int, at: int, end: int) -> None:
        while at < end:
            self._check()
            done = self._some(source, target, at, min(end - at, CHUNK))
            if not done:
                return  # shorter than it was when it was looked at
            at += done

    def _some(self, source: int, target: int, at: int, count: int) -> int:
        if self._range:
            try:
                done = os.copy_file_range(source, target, count, at, at)
            except OSError as e:
                if e.errno not in _NO_RANGE:
                    raise
                self._range = False
            else:
                if done:
                    return done
        return os.pwrite(target, os.pread(source, min(count, 1 << 20), at), at)


def _dress(source: int, target: int) -> None:
    """Give an open file or directory the owner, attributes, mode and times of another, in this order.

    chown takes setuid bits and capabilities away, so both come after it; times are last because all else moves them.
    """
    st = os.fstat(source)
    os.fchown(target, st.st_uid, st.st_gid)
    _attributes(source, target)
    os.fchmod(target, stat.S_IMODE(st.st_mode))
    os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns))


def _dress_special(source: int, target: int, name: str, st: os.stat_result) -> None:
    """The same for what cannot be opened: links, devices, FIFOs and sockets, named in their directories."""
    os.chown(name, st.st_uid, st.st_gid, dir_fd=target, follow_symlinks=False)
    _attributes(f"/proc/self/fd/{source}/{name}", f"/proc/self/fd/{target}/{name}")
    if not stat.S_ISLNK(st.st_mode):
        os.chmod(name, stat.S_IMODE(st.st_mode), dir_fd=target)
    os.utime(name, ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=target, follow_symlinks=False)


def _attributes(source: int | str, target: int | str) -> None:
    follow = isinstance(source, int)  # a descriptor is followed by nature, a name must not be
    try:
        names = os.listxattr(source, follow_symlinks=follow)
    except OSError as e:
        if e.errno != errno.EOPNOTSUPP:
            raise
        return
    for name in names:
        value = os.getxattr(source, name, follow_symlinks=follow)
        os.setxattr(target, name, value, follow_symlinks=follow)
