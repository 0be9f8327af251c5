"""The tree that a layer is extracted onto, seen through descriptors of its directories.

Nothing here gives the kernel a path that a symbolic link could lead astray: names are single components below a
descriptor and never followed, or they are resolved by openat2 with RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH.

Why the cache of open directories (`opened`) is right. Its keys are *canonical* paths: every component is a directory,
none a symbolic link. While `opened[p] = fd` stands, `p` names the directory behind `fd`, because
1. an entry is made only when that was seen: `p`'s last component was opened with O_NOFOLLOW below the descriptor of its
   canonical parent, or the whole of `p` by openat2 without symbolic links;
2. nobody but this object changes the tree while a layer is extracted (the snapshot is not mounted yet; who runs a
   container on it all the same spoils his own layer, and nothing outside the root), and it never renames: the only way
   for `p` to stop naming that directory is the removal of it or of a directory above it;
3. a directory must be empty to be removed, so all below goes first; every rmdir is in `_remove_directory`, which
   forgets each directory that it removes. Replacing (file, symlink or whiteout over directory) is remove and create.
Removing something else than a directory cannot touch a key, so the common case costs no look at the cache.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from wherry_shared.openat2 import BENEATH, NO_SYMLINKS, openat2

from .limits import Limits
from .names import join, show
from .parents import OPAQUE, Parents, copy_attributes, is_whiteout

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_OPENED = 256
_MAX_STEPS = 1 << 24  # components looked at on behalf of symbolic links, in one layer


class Tree:
    """Directories below `root`, by canonical path. Not for use by two threads.

    `overlay`: the root is an overlay's upper directory. `standalone`: what lies below it is not known.
    """

    def __init__(self, root: str, parents: Parents, limits: Limits, *, overlay: bool, standalone: bool) -> None:
        try:
            self.root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"the root {root} to extract to is no directory") from error
        self.opened: dict[bytes, int] = {b"": self.root}
        # Directories whose group is not this process's: what is created there may inherit it, by setgid or by mount.
        self.group = os.getegid()
        self.foreign: set[int] = set()
        # atime and mtime of directories, set at the end because every creation below changes them.
        self.times: dict[bytes, tuple[int, int]] = {}
        # What this layer brought or passed through, for an opaque marker that comes late; an overlay needs no record.
        self.seen: set[bytes] | None = None if overlay else set()
        # Files of the parents' that stand in an overlay's upper because a hard link leads there: they go with it, too.
        self.lent: set[bytes] = set()
        self._opaque: set[bytes] = set()
        # The directory asked about last, and whether parents show in it: whiteouts of one directory come together.
        self._merged: tuple[bytes, bool] = b"", True
        self._parents = parents
        self._limits = limits
        self._overlay = overlay
        self._standalone = standalone
        self._steps = 0
        self._note(self.root)

    def close(self) -> None:
        for fd in self.opened.values():
            os.close(fd)
        self.opened.clear()

    # -- directories

    def enter(self, path: bytes) -> tuple[bytes, int]:
        """The canonical path of the directory that the clean `path` leads to inside the root, and its descriptor.

        Symbolic links are followed as if the root were `/`; what is missing is created. The two directories entered
        last stay open: a full cache closes its older half. Raises `InvalidArgument`, `FailedPrecondition`.
        """
        if not path:
            return path, self.root
        fd = self.opened.pop(path, -1)
        if fd >= 0:
            self.opened[path] = fd  # now the newest
            return path, fd
        try:
            fd = openat2(self.root, path, DIRECTORY_FLAGS, NO_SYMLINKS | BENEATH)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            at, fd, missing = self.resolve(path)
            if not missing:
                return self.enter(at)
            for part in missing:
                at, fd = self._imply(at, fd, part)
            return at, fd
        self._note(fd)
        self.keep(path, fd)
        return path, fd

    def keep(self, path: bytes, fd: int) -> None:
        """Cache the open directory `fd`, whose canonical path is `path`."""
        if len(self.opened) >= _MAX_OPENED:
            for old in list(self.opened)[1 : _MAX_OPENED // 2]:  # the first is the root
                self._shut(old)
        self.opened[path] = fd
        seen = self.seen
        if seen is not None:
            while path and path not in seen:
                seen.add(path)
                path = path.rpartition(b"/")[0]

    def _note(self, fd: int) -> None:
        """Look whether an existing directory may pass its group on."""
        if os.fstat(fd).st_gid != self.group:
            self.foreign.add(fd)

    def _shut(self, path: bytes) -> None:
        fd = self.opened.pop(path, -1)
        if fd >= 0:
            self.foreign.discard(fd)
            os.close(fd)

    def resolve(self, path: bytes) -> tuple[bytes, int, list[bytes]]:
        """Where `path` leads to inside the root: canonical path and descriptor of the last directory that is there,
        and what of it is missing from there on. The descriptor is good until the next call.

        One component at a time from a canonical directory to the next. Behind the first missing component the rest is
        lexical, as there is nothing to look at: a dangling link ends in the directories that it names.
        """
        at, fd = b"", self.root
        todo = deque(path.split(b"/"))
        missing: list[bytes] = []
        links = 0
        while todo:
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise ResourceExhausted("the layer sends its entries through too many symbolic links")
            part = todo.popleft()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if missing:
                    missing.pop()
                else:
                    at, fd = self.enter(at.rpartition(b"/")[0])
            elif missing:
                missing.append(part)
            elif (found := self._child(at, fd, part)) is not None:
                at, fd = join(at, part), found
            elif (target := self._link(fd, join(at, part), part)) is None:
                missing.append(part)
            else:
                links += 1
                if links > self._limits.max_links_walked:
                    raise InvalidArgument(f"too many symbolic links on the way to {show(path)}")
                todo.extendleft(reversed(target.split(b"/")))
                if target.startswith(b"/"):
                    at, fd = b"", self.root
        return at, fd, missing

    def _child(self, at: bytes, fd: int, part: bytes) -> int | None:
        """The directory `part` in the directory `at`; none if there is no directory of this name."""
        path = join(at, part)
        child = self.opened.get(path)
        if child is not None:
            return child
        try:
            child = os.open(part, DIRECTORY_FLAGS, dir_fd=fd)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return None
        self._note(child)
        self.keep(path, child)
        return child

    def _link(self, fd: int, path: bytes, part: bytes) -> bytes | None:
        """The target of the symbolic link `part`; none if there is nothing, or a whiteout, of this name."""
        try:
            return os.readlink(part, dir_fd=fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        if self.look(fd, part) is None:
            return None
        raise InvalidArgument(f"{show(path)} should be a directory and is none")

    def _imply(self, at: bytes, fd: int, part: bytes) -> tuple[bytes, int]:
        """Create a directory that the layer has no entry for: as it is in the parents, or root's and 0755."""
        path = join(at, part)
        if len(path) > self._limits.max_path:
            raise ResourceExhausted(f"the path {show(path)} is too long: {len(path)} bytes")
        if self._standalone:
            raise FailedPrecondition(f"the layer needs its parent: it has no entry for the directory {show(path)}")
        new = self.make_directory(fd, path, part)
        model = None if self._hidden(path) else self._parents.directory(path)
        if model is None:
            os.fchmod(new, 0o755)
            os.fchown(new, os.geteuid(), self.group)
        else:
            try:
                info = copy_attributes(model, new)
            finally:
                os.close(model)
            self.times[path] = info.st_atime_ns, info.st_mtime_ns
            if info.st_gid != self.group:
                self.foreign.add(new)
        return path, new

    def make_directory(self, fd: int, path: bytes, base: bytes) -> int:
        """Create the directory `base`, in place of anything else of the name, and open it.

        In an overlay a file or whiteout that goes has hidden what the parents have there: so must the directory.
        """
        replaced = False
        try:
            os.mkdir(base, 0o700, dir_fd=fd)
        except FileExistsError:
            self.remove(fd, path, base)
            os.mkdir(base, 0o700, dir_fd=fd)
            replaced = True
        new = os.open(base, DIRECTORY_FLAGS, dir_fd=fd)
        self.keep(path, new)
        if replaced and self._overlay:
            os.setxattr(new, OPAQUE, b"y")
            self._opaque.add(path)
            self._merged = b"", True
        return new

    def apply_times(self) -> None:
        """Give the directories their times, when nothing is created any more."""
        for path, (atime, mtime) in self.times.items():
            os.utime(self.opened.get(path) or self.enter(path)[1], ns=(atime, mtime))
        self.times.clear()

    # -- removal and whiteouts

    def remove(self, fd: int, path: bytes, base: bytes) -> None:
        """Remove whatever `base` in the directory `fd` is, and all below; raises `FileNotFoundError`."""
        try:
            os.unlink(base, dir_fd=fd)
        except IsADirectoryError:
            self._remove_directory(fd, path, base)
        self._lose(path)

    def _remove_directory(self, parent: int, path: bytes, base: bytes) -> None:
        """Depth first, without recursion and with one descriptor, however deep the tree is.

        That `..` leads back is looked at: a container that runs on the snapshot all the same can move a directory
        further up, from where the way back would lead out of the root, to what is somebody else's.
        """
        levels = [[base]]  # names still to remove, one list per directory on the way down to `fd`
        above: list[tuple[int, int]] = []  # those directories, but for `fd`
        prefix = path.rpartition(b"/")[0]
        fd = os.dup(parent)
        try:
            while True:
                if levels[-1]:
                    name = levels[-1][-1]
                    above.append(_identity(fd))
                    fd = _step(fd, name)
                    prefix = join(prefix, name)
                    levels.append(list(self._remove_files(fd, prefix)))
                else:
                    levels.pop()
                    fd = _step(fd, b"..")
                    if _identity(fd) != above.pop():
                        raise FailedPrecondition(f"the directory {show(prefix)} was moved while a layer was extracted")
                    os.rmdir(levels[-1].pop(), dir_fd=fd)
                    self._forget(prefix)
                    prefix = prefix.rpartition(b"/")[0]
                    if len(levels) == 1:
                        return
        finally:
            os.close(fd)

    def _remove_files(self, fd: int, prefix: bytes) -> Iterator[bytes]:
        """Remove what is no directory in `fd`; yields the names of the directories."""
        for entry in os.listdir(fd):
            name = os.fsencode(entry)
            try:
                os.unlink(name, dir_fd=fd)
            except IsADirectoryError:
                yield name
            self._lose(join(prefix, name))

    def _forget(self, path: bytes) -> None:
        self._shut(path)
        self.times.pop(path, None)
        self._opaque.discard(path)
        self._lose(path)

    def _lose(self, path: bytes) -> None:
        self.lent.discard(path)
        if self.seen is not None:
            self.seen.discard(path)

    def whiteout(self, fd: int, path: bytes, base: bytes, owner: tuple[int, int]) -> None:
        """Make `base` not exist: remove it, and in an overlay hide what the parents have of the name."""
        with suppress(FileNotFoundError):
            self.remove(fd, path, base)
        if self._overlay and self._shines_through(path.rpartition(b"/")[0]):
            os.mknod(base, stat.S_IFCHR, 0, dir_fd=fd)
            if owner != (os.geteuid(), self.group):
                os.chown(base, *owner, dir_fd=fd, follow_symlinks=False)

    def _shines_through(self, path: bytes) -> bool:
        """Whether the parents may show in this directory.

        Where they cannot, a whiteout hides nothing, and the kernel would list it as a name that cannot be looked up.
        """
        if not path or (not self._parents and not self._hidden(path)):
            return True
        if self._merged[0] != path:
            self._merged = path, not self._hidden(path) and self._parents.shine_through(path)
        return self._merged[1]

    def opaque(self, fd: int, path: bytes) -> None:
        """Make the directory hide all that this layer did not bring to it; more of the layer may still follow."""
        if not self._hidden(path):
            self._prune(path)
        self._opaque.add(path)
        self._merged = b"", True
        if self._overlay:
            os.setxattr(fd, OPAQUE, b"y")
            if not path:
                self._hide_parents_root()

    def _hide_parents_root(self) -> None:
        """Whiteouts for the parents' top level: the kernel does not honour the xattr on the root of an upper."""
        if self._standalone:
            raise FailedPrecondition("the layer needs its parent: it hides all of it")
        for name in self._parents.top_level():
            try:
                os.mknod(name, stat.S_IFCHR, 0, dir_fd=self.root)
            except FileExistsError:
                info = os.stat(name, dir_fd=self.root, follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    os.setxattr(self.enter(name)[1], OPAQUE, b"y")

    def _prune(self, path: bytes) -> None:
        """Remove below `path` what this layer did not bring; of an overlay, whose upper directory has nothing else,
        the whiteouts and what is lent. Directories that were pruned before are not looked into again."""
        todo = [path]
        while todo:
            path, fd = self.enter(todo.pop())
            for entry in os.listdir(fd):
                base = os.fsencode(entry)
                child = join(path, base)
                info = os.stat(base, dir_fd=fd, follow_symlinks=False)
                if (is_whiteout(info) or child in self.lent) if self.seen is None else child not in self.seen:
                    self.remove(fd, child, base)
                elif child not in self._opaque and stat.S_ISDIR(info.st_mode):
                    todo.append(child)

    def _hidden(self, path: bytes) -> bool:
        """Whether this layer made the directory, or one above it, opaque."""
        if not self._opaque:
            return False
        while path not in self._opaque:
            if not path:
                return False
            path = path.rpartition(b"/")[0]
        return True

    def is_taken(self, fd: int, base: bytes) -> bool:
        """Whether the directory `fd` has anything of the name, were it a whiteout."""
        try:
            os.stat(base, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def below(self, path: bytes) -> int | None:
        """An O_PATH descriptor, the caller's to close, of what the parents show under this name; none for nothing."""
        return None if self._hidden(path.rpartition(b"/")[0]) else self._parents.entry(path)

    def look(self, fd: int, base: bytes) -> os.stat_result | None:
        """What `base` in the directory `fd` is; none for nothing and for an overlay's whiteout, a device 0:0."""
        try:
            info = os.stat(base, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return None if self._overlay and is_whiteout(info) else info


def _identity(fd: int) -> tuple[int, int]:
    info = os.fstat(fd)
    return info.st_dev, info.st_ino


def _step(fd: int, name: bytes) -> int:
    """Go from the directory `fd`, which is closed then, to the directory `name` in it."""
    there = os.open(name, DIRECTORY_FLAGS, dir_fd=fd)
    os.close(fd)
    return there
