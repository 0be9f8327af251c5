"""What a tree has that another has not: one walk in the order of names, a directory before what is in it.

`Layer` walks one overlay's upper directory alone, `Trees` two trees side by side. Both are without recursion, hold at
most HELD directories open on a side, follow no symbolic link and cross no mount. The tree may change meanwhile (a
container that is not paused): what vanishes counts as not there, a directory moved under the walk ends it (Aborted).
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator

from wherry_shared.errors import Aborted, ResourceExhausted
from wherry_shared.openat2 import BENEATH, NO_MAGICLINKS, NO_SYMLINKS, NO_XDEV, openat2

from . import xattrs
from .limits import Limits
from .names import join, show
from .parents import OPAQUE, Parents, is_whiteout
from .xattrs import NONE, Xattrs

ADDED, CHANGED, DELETED, SAME = "A", "C", "D", "="
HELD = 64
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_INSIDE = NO_XDEV | NO_MAGICLINKS | NO_SYMLINKS | BENEATH
_NAME, _FILE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, os.O_RDONLY | os.O_CLOEXEC
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ESTALE})
_CHUNK = 1 << 20
_MOVED = ("trusted.overlay.redirect", "trusted.overlay.metacopy")

Check = Callable[[], None]


class Redirected(Exception):
    """The upper directory alone does not say what the tree is: look at the whole trees."""


class Level:
    """A directory on the way. `info` and `xattrs` are the right side's; `written` is for who writes an archive."""

    __slots__ = ("above", "depth", "hides", "info", "left", "path", "right", "todo", "written", "xattrs")

    def __init__(self, path: bytes, above: Level | None, info: os.stat_result, attributes: Xattrs = NONE) -> None:
        self.path = path
        self.above = above
        self.depth: int = above.depth + 1 if above is not None else 0
        self.info = info
        self.xattrs = attributes
        self.left = self.right = -1
        self.todo: list[bytes] = []
        self.written = above is None  # the root itself is the snapshotter's
        self.hides: set[bytes] | None = None


class Found:
    """One change: `base` in the directory `level`. `info` is the right side's, of a deletion the directory's."""

    __slots__ = ("base", "info", "kind", "level", "own", "path", "xattrs")

    def __init__(
        self, kind: str, level: Level, base: bytes, info: os.stat_result | None = None, attributes: Xattrs = NONE,
        own: Level | None = None,
    ) -> None:  # fmt: skip
        self.kind = kind
        self.level = level
        self.base = base
        self.path = join(level.path, base)
        self.info = level.info if info is None else info
        self.xattrs = attributes
        self.own = own


class Walk:
    """The part that both walks share. Iterate once; `close` lets go of the descriptors. Not for two threads."""

    def __init__(self, right: int, limits: Limits, check: Check, after: bytes = b"") -> None:
        self._right = right
        self._limits = limits
        self._check = check
        # Components of the path that the walk goes on after, and the directories on the way there.
        self._after = after.split(b"/") if after else []
        self._way = list(itertools.accumulate(self._after, join, initial=b"")) if after else []
        self._open: list[Level] = []

    def __iter__(self) -> Iterator[Found]:
        top = Level(b"", None, os.fstat(self._right))
        self._begin(top, None)
        while self._open:
            level = self._open[-1]
            if not level.todo:
                self._leave()
                continue
            name = level.todo.pop()
            skipped = self._is_after(level, name)
            try:
                found = self._step(level, name)
            except FileNotFoundError:
                continue
            if found is not None and not skipped:
                yield found

    def close(self) -> None:
        """Close what the walk holds open."""
        while self._open:
            self._leave()

    def fd(self, level: Level) -> int:
        """A descriptor of the right side's directory, good until the walk goes on or `release`s it."""
        if level.right < 0:
            self._reopen(level)
        return level.right

    def release(self, level: Level) -> None:
        """Let go of a directory that the walk has left."""
        if level.depth >= len(self._open) or self._open[level.depth] is not level:
            self._shut(level)

    # -- what the two walks differ in

    def _begin(self, level: Level, name: bytes | None) -> None:
        raise NotImplementedError

    def _step(self, level: Level, name: bytes) -> Found | None:
        raise NotImplementedError

    def existed(self, found: Found) -> bool:
        """Whether the left side has anything of the name."""
        return found.kind != ADDED

    # -- levels

    def _begin_or_shut(self, level: Level, name: bytes) -> None:
        try:
            self._begin(level, name)
        except BaseException:
            self._shut(level)
            raise

    def _enter(self, level: Level, names: list[bytes]) -> None:
        """Go into a directory whose descriptors are open; `names` are those of both sides."""
        if len(level.path) > self._limits.max_path:
            raise ResourceExhausted(f"{show(level.path)} is too long a path for a layer: {len(level.path)} bytes")
        self._check()
        names.sort(reverse=True)
        depth = level.depth
        if self._on_way(level):
            first = self._after[depth]
            while names and names[-1] < first:
                names.pop()
        level.todo = names
        self._open.append(level)
        if len(self._open) > HELD:
            self._shut(self._open[-1 - HELD])

    def _leave(self) -> None:
        self._shut(self._open.pop())

    def _on_way(self, level: Level) -> bool:
        """Whether the place that the walk goes on after lies in this directory."""
        return level.depth < len(self._after) and level.path == self._way[level.depth]

    def _is_after(self, level: Level, name: bytes) -> bool:
        """Whether this name was told before: it is the place, or on the way there."""
        return bool(self._after) and self._on_way(level) and name == self._after[level.depth]

    def _shut(self, level: Level) -> None:
        for fd in {level.right, level.left}:
            if fd >= 0:
                os.close(fd)
        level.right = level.left = -1

    def _reopen(self, level: Level) -> None:
        if level.path:
            level.right = self._again(self._right, level.path)
        else:
            level.right = os.dup(self._right)
        info = os.fstat(level.right)
        if (info.st_dev, info.st_ino) != (level.info.st_dev, level.info.st_ino):
            raise Aborted(f"the directory {show(level.path)} was moved while it was compared")

    def _again(self, root: int, path: bytes) -> int:
        try:
            return openat2(root, path, _DIRECTORY, _INSIDE)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            raise Aborted(f"the directory {show(path)} was moved while it was compared") from error


def is_absent(info: os.stat_result) -> bool:
    """What no layer can hold: a socket, and the device 0:0, which is overlayfs's whiteout."""
    return stat.S_ISSOCK(info.st_mode) or is_whiteout(info)


def mtime(info: os.stat_result) -> int:
    """The time as a layer can say it: nanoseconds, the epoch for what lies before."""
    return max(0, info.st_mtime_ns)


def _names(fd: int) -> list[bytes]:
    return [os.fsencode(name) for name in os.listdir(fd)]


def _inside(fd: int, base: bytes) -> int:
    """The directory `base` in `fd`; FileNotFoundError when it is no directory any more, or a mount."""
    try:
        return openat2(fd, base, _DIRECTORY, _INSIDE)
    except OSError as error:
        if error.errno in _GONE:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), base) from error
        raise


def _attributes(fd: int, base: bytes) -> tuple[Xattrs, Xattrs]:
    return xattrs.read(b"/proc/self/fd/%d/%b" % (fd, base))


class Layer(Walk):
    """The upper directory `right` over `parents`: everything in it is a change, a whiteout a deletion.

    Where a directory is opaque, what the parents have there is deleted name by name, as a walk of both trees would say.
    Redirected: a name in it stands for content elsewhere (overlayfs's redirect_dir and metacopy).
    """

    def __init__(self, right: int, parents: Parents, limits: Limits, check: Check, after: bytes = b"") -> None:
        super().__init__(right, limits, check, after)
        self._parents = parents

    def _begin(self, level: Level, name: bytes | None) -> None:
        above = level.above
        if name is None or above is None:
            level.right = os.dup(self._right)
        names = _names(level.right)
        if level.hides is not None:
            names += level.hides.difference(names)
        self._enter(level, names)

    def _step(self, level: Level, name: bytes) -> Found | None:
        fd = self.fd(level)
        try:
            info = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            if level.hides is not None and name in level.hides:
                return Found(DELETED, level, name)
            raise
        if is_whiteout(info):
            # In a directory that hides its parents' there is nothing for a whiteout to hide, or it hides one of them.
            return Found(DELETED, level, name) if level.hides is None or name in level.hides else None
        if stat.S_ISSOCK(info.st_mode):
            return Found(DELETED, level, name) if self._is_below(level, name) else None
        attributes, overlay = _attributes(fd, name)
        if overlay and any(key in _MOVED for key, _ in overlay):
            raise Redirected
        found = Found(CHANGED, level, name, info, attributes)
        if stat.S_ISDIR(info.st_mode):
            own = Level(found.path, level, info, attributes)
            if level.hides is not None or (OPAQUE, b"y") in overlay:
                own.hides = self._parents.names(found.path)
            found.own = own
            own.right = _inside(fd, name)
            self._begin_or_shut(own, name)
        return found

    def existed(self, found: Found) -> bool:
        return found.kind == DELETED or self._is_below(found.level, found.base)

    def _is_below(self, level: Level, name: bytes) -> bool:
        if level.hides is not None:
            return name in level.hides
        below = self._parents.entry(join(level.path, name))
        if below is None:
            return False
        os.close(below)
        return True


class Trees(Walk):
    """Two whole trees; `left` may be none, and then everything is added.

    Changed is what differs in type, mode, owner, device, size, time, link's target, extended attributes, or in which
    names are one file; where both times are whole seconds, as a layer's may be, the bytes are compared too.
    Names of files with several links are told even if they are the SAME, since an archive may need them.
    """

    def __init__(self, left: int | None, right: int, limits: Limits, check: Check, after: bytes = b"") -> None:
        super().__init__(right, limits, check, after)
        self._left = left
        self._to_left: dict[tuple[int, int], tuple[int, int] | None] = {}
        self._to_right: dict[tuple[int, int], tuple[int, int]] = {}
        self._in_left: dict[Level, os.stat_result] = {}

    def _begin(self, level: Level, name: bytes | None) -> None:
        if name is None:
            level.right = os.dup(self._right)
            if self._left is not None:
                level.left = os.dup(self._left)
                self._in_left[level] = os.fstat(self._left)
        names = _names(level.right)
        if level.left >= 0:
            names = list({*names, *_names(level.left)})
        self._enter(level, names)

    def _leave(self) -> None:
        self._in_left.pop(self._open[-1], None)
        super()._leave()

    def _step(self, level: Level, name: bytes) -> Found | None:
        right = self._look(self.fd(level), name)
        fd = self._left_fd(level)
        left = self._look(fd, name) if fd >= 0 else None
        if right is None or is_absent(right):
            both = left is not None and right is not None and is_absent(left)
            return None if left is None or both else Found(DELETED, level, name)
        if left is not None and is_absent(left):
            left = None
        attributes, _ = _attributes(level.right, name)
        kind = ADDED if left is None else CHANGED if self._differs(level, name, left, right, attributes) else SAME
        found = Found(kind, level, name, right, attributes)
        if stat.S_ISDIR(right.st_mode):
            self._go_into(found, left)
        elif right.st_nlink > 1 and left is None:
            self._to_left[_identity(right)] = None
        elif kind == SAME and right.st_nlink < 2:
            return None
        return found if kind != SAME or not stat.S_ISDIR(right.st_mode) else None

    def _go_into(self, found: Found, left: os.stat_result | None) -> None:
        level = found.level
        own = Level(found.path, level, found.info, found.xattrs)
        found.own = own
        own.right = _inside(level.right, found.base)
        if left is not None and stat.S_ISDIR(left.st_mode):
            own.left = _inside(level.left, found.base)
            self._in_left[own] = left
        self._begin_or_shut(own, found.base)

    def _look(self, fd: int, name: bytes) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _left_fd(self, level: Level) -> int:
        """The left side's directory, -1 if it has none."""
        known = self._in_left.get(level)
        if level.left < 0 and known is not None and self._left is not None:
            level.left = self._again(self._left, level.path) if level.path else os.dup(self._left)
        return level.left

    def _differs(
        self, level: Level, name: bytes, left: os.stat_result, right: os.stat_result, attributes: Xattrs
    ) -> bool:
        if (left.st_mode, left.st_uid, left.st_gid, left.st_rdev) != (
            right.st_mode, right.st_uid, right.st_gid, right.st_rdev,
        ) or mtime(left) != mtime(right):  # fmt: skip
            changed = True
        elif stat.S_ISDIR(right.st_mode):
            changed = False
        else:
            changed = left.st_size != right.st_size
        if not stat.S_ISDIR(right.st_mode) and (left.st_nlink > 1 or right.st_nlink > 1):
            changed = self._is_regrouped(left, right) or changed
        if changed or _attributes(level.left, name)[0] != attributes:
            return True
        if stat.S_ISLNK(right.st_mode):
            return os.readlink(name, dir_fd=level.left) != os.readlink(name, dir_fd=level.right)
        whole_seconds = left.st_mtime_ns % 1_000_000_000 == 0
        return stat.S_ISREG(right.st_mode) and whole_seconds and bool(right.st_size) and self._bytes_differ(level, name)

    def _is_regrouped(self, left: os.stat_result, right: os.stat_result) -> bool:
        """Whether these two names are one file with other names than before."""
        one, other = _identity(left), _identity(right)
        return self._to_left.setdefault(other, one) != one or self._to_right.setdefault(one, other) != other

    def _bytes_differ(self, level: Level, name: bytes) -> bool:
        one = open_file(name, level.left)
        try:
            other = open_file(name, level.right)
            try:
                while True:
                    self._check()
                    piece = os.read(one, _CHUNK)
                    if piece != os.read(other, _CHUNK):
                        return True
                    if not piece:
                        return False
            finally:
                os.close(other)
        finally:
            os.close(one)


def open_file(name: bytes, directory: int) -> int:
    """A regular file for reading. OSError, ESTALE where it is none (any more).

    A container that runs may put a device there meanwhile, for which opening it, by root and outside of the
    container's rules, may be all it takes.
    """
    held = os.open(name, _NAME, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(held).st_mode):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
        return os.open(f"/proc/self/fd/{held}", _FILE)
    finally:
        os.close(held)


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino
