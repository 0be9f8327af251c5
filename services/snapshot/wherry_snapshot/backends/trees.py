"""Trees that containers wrote, walked by directory descriptors so that nothing in them leads out.

No symbolic link is followed and no mount is crossed (RESOLVE_NO_XDEV stops at bind mounts too, which have the same
device number: a mount that propagated into a snapshot must not take the host's files with it). At most HELD
directories of one walk are open at once, however deep the tree; the way back up is checked by inode.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from wherry_shared.api.snapshot import Usage
from wherry_shared.errors import Aborted, FailedPrecondition
from wherry_shared.openat2 import BENEATH, NO_MAGICLINKS, NO_SYMLINKS, NO_XDEV, openat2

from . import Check

HELD = 64
ROUNDS = 5
BLOCK = 512
"""The unit of st_blocks, whatever the filesystem's own block size."""
HOLE = 1 << 16

_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS and FS_IOC_SETFLAGS of linux/fs.h, 64 bit
_FLAGS = struct.Struct("I4x")  # the kernel writes 32 bits, though the number says 64
_TOPDIR = 0x20000  # chattr's T
_IMMUTABLE_OR_APPEND = 0x10 | 0x20
# The entry went away, became something else, or is a mount: there is no directory of this tree to go into.
_NOT_OURS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV})

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_RESOLVE = NO_XDEV | NO_MAGICLINKS | NO_SYMLINKS | BENEATH


def open_directory(parent: int, name: str) -> int:
    """A descriptor of the directory `name` in `parent`. OSError EXDEV for a mount, ENOTDIR or ELOOP for a link."""
    return openat2(parent, name, _DIRECTORY, _RESOLVE)


@contextmanager
def trusted_directory(path: os.PathLike[str] | str) -> Iterator[int]:
    """A descriptor of a directory of our own, that only root can have moved."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def spread(path: os.PathLike[str] | str) -> None:
    """Let ext4 put what is made in this directory where there is room, and not near it (docs/decisions/0024)."""
    with suppress(OSError), trusted_directory(path) as fd:  # other filesystems know no such flag
        flags: int = _FLAGS.unpack(fcntl.ioctl(fd, _GETFLAGS, _FLAGS.pack(0)))[0]
        fcntl.ioctl(fd, _SETFLAGS, _FLAGS.pack(flags | _TOPDIR))


class _Level:
    """One directory on the way down: `fd` is -1 while it is not held open, and `identity` says which it was."""

    __slots__ = ("fd", "identity", "name", "todo")

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self.identity = (0, 0)
        self.todo: list[str] = []


class Descent:
    """A place in a tree: goes down by name and up again. It owns the descriptor that it starts from."""

    def __init__(self, fd: int) -> None:
        self._levels = [_Level(fd, "")]

    @property
    def fd(self) -> int:
        return self._levels[-1].fd

    @property
    def depth(self) -> int:
        return len(self._levels) - 1

    @property
    def todo(self) -> list[str]:
        """The directories in this one that are still to be gone into."""
        return self._levels[-1].todo

    @todo.setter
    def todo(self, names: list[str]) -> None:
        self._levels[-1].todo = names

    def enter(self, name: str) -> None:
        """Go into a directory. OSError as `open_directory`; the place is then unchanged."""
        self._levels.append(_Level(open_directory(self.fd, name), name))
        if len(self._levels) > HELD and (far := self._levels[-1 - HELD]).fd >= 0:
            st = os.fstat(far.fd)
            far.identity = (st.st_dev, st.st_ino)
            os.close(far.fd)
            far.fd = -1

    def leave(self) -> str:
        """Go up; the name of the directory that was left. Aborted: it was moved to somewhere else meanwhile."""
        left, above = self._levels[-1], self._levels[-2]
        if above.fd < 0:
            above.fd = _above(left.fd, above.identity)
        self._levels.pop()
        os.close(left.fd)
        return left.name

    def close(self) -> None:
        """Let go of every descriptor."""
        for level in self._levels:
            if level.fd >= 0:
                os.close(level.fd)
        self._levels = []


def _above(fd: int, identity: tuple[int, int]) -> int:
    up = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    st = os.fstat(up)
    if (st.st_dev, st.st_ino) != identity:
        os.close(up)
        raise Aborted("a directory was moved while its tree was walked")
    return up


class Visitor:
    """What a walk does: `visit` on the way down, the rest around the step into a directory and out of it."""

    def visit(self, fd: int) -> list[str]:
        """Treat what lies in a directory; answers the directories in it that are to be gone into."""
        raise NotImplementedError

    def entered(self, name: str, fd: int) -> None:
        """The walk has gone into `name`, which is `fd`; `visit` comes next."""

    def leaving(self, fd: int) -> None:
        """Everything below `fd` is done."""

    def left(self, name: str, fd: int) -> None:
        """The walk is back in `fd`, and `name` in it is done."""


def walk(fd: int, visitor: Visitor, check: Check) -> None:
    """Walk depth-first below `fd`, which is closed at the end. `check` is called once a directory."""
    place = Descent(fd)
    try:
        place.todo = visitor.visit(place.fd)
        while True:
            check()
            if place.todo:
                _step_into(place, visitor)
            else:
                visitor.leaving(place.fd)
                if not place.depth:
                    return
                visitor.left(place.leave(), place.fd)
    finally:
        place.close()


def _step_into(place: Descent, visitor: Visitor) -> None:
    name = place.todo.pop()
    try:
        place.enter(name)
    except OSError as e:
        if e.errno not in _NOT_OURS:
            raise
        return
    visitor.entered(name, place.fd)
    place.todo = visitor.visit(place.fd)


# ---- how much a tree takes


class _Measure(Visitor):
    """Counts inodes once each, and those not at all that `known` has with the same time of change.

    marked: gets the paths of whiteouts.
    """

    def __init__(self, fd: int, known: Mapping[int, int], marked: list[str] | None = None) -> None:
        self.size = 0
        self.inodes = 0
        self._known = known
        self._marked = marked
        self._at: list[str] = []
        self._linked: set[int] = set()
        self._count(os.fstat(fd))

    def visit(self, fd: int) -> list[str]:
        below = []
        for name, st in _entries(fd):
            if self._known.get(st.st_ino) != st.st_ctime_ns:
                self._count(st)
            if stat.S_ISDIR(st.st_mode):
                below.append(name)
            elif self._marked is not None and stat.S_ISCHR(st.st_mode) and not st.st_rdev:
                self._marked.append("/".join([*self._at, name]))
        return below

    def entered(self, name: str, fd: int) -> None:
        self._at.append(name)

    def left(self, name: str, fd: int) -> None:
        self._at.pop()

    def _count(self, st: os.stat_result) -> None:
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            if st.st_ino in self._linked:
                return
            self._linked.add(st.st_ino)
        self.size += st.st_blocks * BLOCK
        self.inodes += 1


class _Changes(Visitor):
    """When each inode was changed for the last time, in ns."""

    def __init__(self) -> None:
        self.at: dict[int, int] = {}

    def visit(self, fd: int) -> list[str]:
        below = []
        for name, st in _entries(fd):
            self.at[st.st_ino] = st.st_ctime_ns
            if stat.S_ISDIR(st.st_mode):
                below.append(name)
        return below


def _entries(fd: int) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(fd) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                yield entry.name, entry.stat(follow_symlinks=False)


def measure(
    path: os.PathLike[str] | str, check: Check, origin: os.PathLike[str] | str = "", marked: list[str] | None = None
) -> Usage:
    """Bytes on disk and inodes of a tree with its root; each inode once. Aborted when it keeps being moved about.

    origin: what the tree was copied from with its inode numbers and times of change, as btrfs does; only what was
    changed since is counted, a file as a whole. marked: gets the paths of its whiteouts.
    """
    known: dict[int, int] = {}
    if origin:
        changes = _Changes()
        with trusted_directory(origin) as fd:
            walk(os.dup(fd), changes, check)
        known = changes.at
    for _ in range(ROUNDS):
        with trusted_directory(path) as fd:
            if marked is not None:
                marked.clear()
            found = _Measure(fd, known, marked)
            try:
                walk(os.dup(fd), found, check)
                return Usage(size=found.size, inodes=found.inodes)
            except Aborted:
                continue
    raise Aborted(f"the tree of {os.path.basename(path)} changes while it is measured")


class _Holes(Visitor):
    def __init__(self) -> None:
        self.found = False

    def visit(self, fd: int) -> list[str]:
        below = []
        for name, st in _entries(fd):
            missing = st.st_size - st.st_blocks * BLOCK
            if stat.S_ISREG(st.st_mode) and missing > HOLE:
                self.found = True
            elif stat.S_ISDIR(st.st_mode):
                below.append(name)
        return [] if self.found else below


def has_holes(path: os.PathLike[str] | str, check: Check) -> bool:
    """Whether some file in a tree lacks more than HOLE bytes on the disk that its size says."""
    holes = _Holes()
    with trusted_directory(path) as fd:
        walk(os.dup(fd), holes, check)
    return holes.found


# ---- what overlay marks as deleted


class _Whiteouts(Visitor):
    def visit(self, fd: int) -> list[str]:
        below = []
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.name)
                elif not (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
                    _unlink_whiteout(fd, entry.name)
        return below


def _unlink_whiteout(fd: int, name: str) -> None:
    with suppress(FileNotFoundError):
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISCHR(st.st_mode) and st.st_rdev == 0:
            os.unlink(name, dir_fd=fd)


def remove_whiteouts(path: os.PathLike[str] | str, check: Check) -> None:
    """Remove the whiteouts of a layer that stands on nothing: character devices 0:0 (the kernel's overlayfs.rst)."""
    with trusted_directory(path) as fd:
        walk(os.dup(fd), _Whiteouts(), check)


def remove_idle_whiteouts(
    path: os.PathLike[str] | str, marked: Sequence[str], parents: Sequence[os.PathLike[str] | str]
) -> int:
    """Remove those of a layer's whiteouts whose directory is laid over none of the parents'; answers how many.

    They hide nothing, and the kernel lists them there as names that cannot be looked up. parents: the nearest first.
    """
    idle: dict[str, bool] = {"": False}
    removed = 0
    with ExitStack() as stack:
        own, *lower = [stack.enter_context(trusted_directory(each)) for each in (path, *parents)]
        for name in marked:
            directory, _, base = name.rpartition("/")
            if directory not in idle:
                idle[directory] = not _is_laid_over(lower, directory)
            if idle[directory]:
                fd = openat2(own, directory, _DIRECTORY, _RESOLVE)
                try:
                    _unlink_whiteout(fd, base)
                finally:
                    os.close(fd)
                removed += 1
    return removed


def _is_laid_over(parents: Sequence[int], directory: str) -> bool:
    for parent in parents:
        try:
            os.close(openat2(parent, directory, _DIRECTORY, _RESOLVE))
        except OSError as e:
            if e.errno == errno.ENOENT:
                continue
            if e.errno in _NOT_OURS:  # a file, a link or a whiteout ends what is laid over each other
                return False
            raise
        return True
    return False


# ---- its end


class _Removal(Visitor):
    def __init__(self, check: Check) -> None:
        self._check = check

    def visit(self, fd: int) -> list[str]:
        below = []
        with os.scandir(fd) as entries:
            for entry in entries:
                self._check()
                if entry.is_dir(follow_symlinks=False) or not _unlinked(fd, entry.name):
                    below.append(entry.name)
        return below

    def left(self, name: str, fd: int) -> None:
        _rmdir(fd, name)


def remove(parent: int, name: str, check: Check) -> None:
    """Remove what `name` in the directory `parent` is, and all below it; absent is no error.

    Files made immutable or append-only go too, and what appears meanwhile. FailedPrecondition: something is mounted
    in the tree, or it is written to faster than removed; the rest is left where it is.
    """
    for _ in range(ROUNDS):
        if _emptied(parent, name, check) and _rmdir(parent, name):
            return
    raise FailedPrecondition(f"directory {name}: something is mounted in it, or it is still being written to")


def _emptied(parent: int, name: str, check: Check) -> bool:
    """Whether a walk through the directory came to its end; False: to be tried again, or never."""
    try:
        fd = open_directory(parent, name)
    except OSError as e:
        if e.errno not in _NOT_OURS:
            raise
        return e.errno == errno.ENOENT or (e.errno != errno.EXDEV and _unlinked(parent, name))
    try:
        walk(fd, _Removal(check), check)
    except Aborted:
        return False
    return True


def _unlinked(fd: int, name: str) -> bool:
    """Whether there is nothing more to do about an entry; False: it is a directory by now."""
    try:
        _unlocking(os.unlink, fd, name)
    except (FileNotFoundError, IsADirectoryError) as e:
        return isinstance(e, FileNotFoundError)
    except OSError as e:
        # A file that something is mounted on stays, and then so does its directory, which is found out there.
        if e.errno != errno.EBUSY:
            raise
    return True


def _rmdir(fd: int, name: str) -> bool:
    """Whether the directory is gone; False: something is in it or mounted on it, or it is no directory by now."""
    try:
        _unlocking(os.rmdir, fd, name)
    except FileNotFoundError:
        return True
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOTDIR):
            raise
        return False
    return True


def _unlocking(take: Callable[..., None], fd: int, name: str) -> None:
    """Unlink or rmdir; an entry that is locked by its flags is unlocked first."""
    try:
        take(name, dir_fd=fd)
    except PermissionError:
        _unlock(fd, name)
        take(name, dir_fd=fd)


def _unlock(fd: int, name: str) -> None:
    """Clear the immutable and append-only flags of an entry and of the directory that it is in."""
    _clear_flags(fd)
    try:
        held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    except FileNotFoundError:
        return
    try:
        # Only files and directories have flags, and to open anything else could set a device off.
        if stat.S_IFMT(os.fstat(held).st_mode) in (stat.S_IFREG, stat.S_IFDIR):
            _clear_flags_of(f"/proc/self/fd/{held}")
    finally:
        os.close(held)


def _clear_flags_of(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _clear_flags(fd)
    finally:
        os.close(fd)


def _clear_flags(fd: int) -> None:
    try:
        flags: int = _FLAGS.unpack(fcntl.ioctl(fd, _GETFLAGS, _FLAGS.pack(0)))[0]
        if flags & _IMMUTABLE_OR_APPEND:
            fcntl.ioctl(fd, _SETFLAGS, _FLAGS.pack(flags & ~_IMMUTABLE_OR_APPEND))
    except OSError as e:
        if e.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            raise
