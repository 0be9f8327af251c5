"""What lies below an overlay's upper directory: its lower directories, nearest first, seen as one."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import closing

from wherry_shared.errors import NotFound
from wherry_shared.openat2 import BENEATH, IN_ROOT, NO_MAGICLINKS, NO_SYMLINKS, openat2

OPAQUE = "trusted.overlay.opaque"
_RESOLVE = IN_ROOT | NO_MAGICLINKS
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_REMEMBERED = 1 << 16
_OVERLAY_XATTRS = ("trusted.overlay.", "user.overlay.")


class Parents:
    """Read-only. Symbolic links are followed inside the one parent that has them, as containerd does."""

    def __init__(self, roots: tuple[str, ...]) -> None:
        self._roots: list[int] = []
        self._opaque: dict[tuple[int, bytes], bool | None] = {}
        for root in roots:
            try:
                self._roots.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            except OSError as error:
                self.close()
                raise NotFound(f"the parent {root}: {error.strerror}") from error

    def __bool__(self) -> bool:
        return bool(self._roots)

    def close(self) -> None:
        while self._roots:
            os.close(self._roots.pop())

    def directory(self, path: bytes) -> int | None:
        """A descriptor, the caller's to close, of the directory that `path` is; none if it is none."""
        return self._find(path, _DIRECTORY)

    def entry(self, path: bytes) -> int | None:
        """An O_PATH descriptor, the caller's to close, of whatever `path` is (a last symbolic link is not followed)."""
        fd = self._find(path, os.O_PATH | os.O_NOFOLLOW)
        if fd is not None and is_whiteout(os.fstat(fd)):
            os.close(fd)
            return None
        return fd

    def shine_through(self, path: bytes) -> bool:
        """Whether overlayfs lays a directory `path` over one of the parents'. It follows no symbolic link for that."""
        with closing(self._laid_over(path)) as found:
            for index, _ in found:
                return not any(self._ends_above(nearer, path) for nearer in range(index))
        return False

    def top_level(self) -> Iterator[bytes]:
        """The names at the root of the parents, each once, without what a nearer parent has removed."""
        seen: set[bytes] = set()
        for root in self._roots:
            for entry in os.listdir(root):
                name = os.fsencode(entry)
                if name not in seen:
                    seen.add(name)
                    if not is_whiteout(os.stat(name, dir_fd=root, follow_symlinks=False)):
                        yield name

    def names(self, path: bytes) -> set[bytes]:
        """What the directory `path` holds in the parents taken together; nothing if it is none. No link is followed."""
        found: set[bytes] = set()
        gone: set[bytes] = set()
        with closing(self._laid_over(path)) as laid_over:
            for index, fd in laid_over:
                for name in map(os.fsencode, os.listdir(fd)):
                    if name not in found and name not in gone:
                        removed = is_whiteout(os.stat(name, dir_fd=fd, follow_symlinks=False))
                        (gone if removed else found).add(name)
                if path and (self._is_opaque(index, path) or self._ends_above(index, path)):
                    break
        return found

    def _laid_over(self, path: bytes) -> Generator[tuple[int, int], None, None]:
        """The parents that have a directory `path`, up to one in which something else is there: their indices, and the
        directories' descriptors, each open until the next one. No link is followed."""
        for index, root in enumerate(self._roots):
            try:
                fd = openat2(root, path, _DIRECTORY | os.O_NOFOLLOW, NO_SYMLINKS | BENEATH)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue
                if error.errno in (errno.ENOTDIR, errno.ELOOP):  # a file, a link or a whiteout
                    return
                raise
            try:
                yield index, fd
            finally:
                os.close(fd)

    def _find(self, path: bytes, flags: int) -> int | None:
        for index, root in enumerate(self._roots):
            try:
                fd = openat2(root, path, flags, _RESOLVE)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue
                if error.errno in (errno.ENOTDIR, errno.ELOOP):  # a file or a whiteout is in the way
                    return None
                raise
            if any(self._ends_above(nearer, path) for nearer in range(index)):
                os.close(fd)
                return None
            return fd
        return None

    def _ends_above(self, index: int, path: bytes) -> bool:
        """Whether a directory above `path` is opaque in this parent, so that the parents after it do not count."""
        at = path.find(b"/")
        while at >= 0:
            opaque = self._is_opaque(index, path[:at])
            if opaque is not False:
                return bool(opaque)
            at = path.find(b"/", at + 1)
        return False

    def _is_opaque(self, index: int, path: bytes) -> bool | None:
        """Whether the directory is opaque in this parent; none if it is not there. Remembered: many paths share it."""
        key = index, path
        if key not in self._opaque:
            if len(self._opaque) >= _REMEMBERED:
                self._opaque.clear()
            self._opaque[key] = _read_opaque(self._roots[index], path)
        return self._opaque[key]


def _read_opaque(root: int, path: bytes) -> bool | None:
    try:
        fd = openat2(root, path, _DIRECTORY, _RESOLVE)
    except OSError:
        return None
    try:
        return os.getxattr(fd, OPAQUE) == b"y"
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP):
            raise
        return False
    finally:
        os.close(fd)


def copy_attributes(source: int, target: int) -> os.stat_result:
    """Owner, xattrs, mode and times of the object `source` for `target`, descriptors of any kind (O_PATH too).

    Returns what stat(2) says of the source. What overlayfs keeps in xattrs for itself stays behind.
    """
    info = os.fstat(source)
    there, here = f"/proc/self/fd/{source}", f"/proc/self/fd/{target}"
    os.chown(here, info.st_uid, info.st_gid)
    try:
        names = os.listxattr(there)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        names = []
    for name in names:
        if not name.startswith(_OVERLAY_XATTRS):
            os.setxattr(here, name, os.getxattr(there, name))
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(here, stat.S_IMODE(info.st_mode))
    os.utime(here, ns=(info.st_atime_ns, info.st_mtime_ns))
    return info


def copy_up(source: int, directory: int, base: bytes) -> None:
    """Create in `directory` what the O_PATH descriptor `source` is; `base` is free. Raises `IsADirectoryError`."""
    info = os.fstat(source)
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), base)
    if stat.S_ISREG(info.st_mode):
        _copy_file(source, directory, base)
    elif stat.S_ISLNK(info.st_mode):
        os.symlink(os.readlink(b"", dir_fd=source), base, dir_fd=directory)
    else:
        os.mknod(base, info.st_mode, info.st_rdev, dir_fd=directory)
    target = os.open(base, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        copy_attributes(source, target)
    finally:
        os.close(target)


def _copy_file(source: int, directory: int, base: bytes) -> None:
    reader = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        writer = os.open(base, flags, 0o600, dir_fd=directory)
        try:
            _copy_bytes(reader, writer)
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def _copy_bytes(reader: int, writer: int) -> None:
    try:
        while os.copy_file_range(reader, writer, 1 << 30):
            pass
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        while os.sendfile(writer, reader, None, 1 << 30):  # from where the other stopped
            pass


def is_whiteout(info: os.stat_result) -> bool:
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0
