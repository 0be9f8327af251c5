"""Directories named by number: made aside, renamed when they are whole, renamed away before they are removed.

`<root>/snapshots/<n>` is a snapshot, `new-<n>` one in the making, `rm-<n>` one on its way out; other names are left
alone, such as `lost-<n>`: what a restored database did not know.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from wherry_shared.api.snapshot import Usage

from . import Check, Entry, Snapshot, trees

_ENTRY = re.compile(r"(?:new-|rm-)?([0-9]+)(?:-links)?\Z")
_FSOPEN, _FSOPEN_CLOEXEC = 430, 1  # linux/mount.h
_libc = ctypes.CDLL(None, use_errno=True)


def to_the_end() -> None:
    """The check of what is not to be stopped."""


def magic(path: Path) -> int:
    """The f_type of statfs(2), its first word, which the standard library does not give. `path` need not be there."""
    while not path.exists():
        path = path.parent
    buffer = ctypes.create_string_buffer(256)
    _checked(_libc.statfs(os.fsencode(path), buffer), path)
    return ctypes.c_long.from_buffer(buffer).value


def _checked(result: int, path: Path) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))


def has_filesystem(kind: str) -> bool:
    """Whether the kernel has it, loaded for this if it is a module.

    fsopen(2) asks for the module as a mount would, and mounts nothing: that takes no right to load modules, which a
    unit may have taken away.
    """
    if kind not in Path("/proc/filesystems").read_text().split():
        fd = _libc.syscall(_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
        if fd >= 0:
            os.close(fd)
    return kind in Path("/proc/filesystems").read_text().split()


class Directories:
    """The half of a backend that is the same for all that keep a directory a snapshot."""

    capabilities: frozenset[str] = frozenset()
    copies = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.snapshots = root / "snapshots"
        for path in (root, self.snapshots):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.chmod(0o700)  # an unprivileged user must not reach setuid files in a layer (CVE-2021-41103)

    def path(self, number: int) -> str:
        return f"{self.snapshots}/{number}"

    def tree(self, number: int) -> str:
        """The directory that the container's files are in."""
        return self.path(number)

    def make(self, number: int, fill: Callable[[str], None]) -> None:
        """Make a directory whole or not at all: `fill` gets an empty one of mode 0700."""
        new = f"{self.snapshots}/new-{number}"
        try:
            self.begin(new)
            fill(new)
            os.rename(new, self.path(number))
        except BaseException:
            self.delete(f"new-{number}", to_the_end)
            raise

    def begin(self, new: str) -> None:
        """Make the directory that is to be filled."""
        os.mkdir(new, 0o700)

    def create(self, snapshot: Snapshot, check: Check) -> None:
        """Each has its own, with `make`."""
        raise NotImplementedError

    def make_again(self, snapshot: Snapshot, check: Check) -> bool:
        if os.path.lexists(self.path(snapshot.number)):
            return False
        self.create(snapshot, check)
        return True

    def seal(self, snapshot: Snapshot, rebase: bool, check: Check) -> Usage:
        return self.usage(snapshot, check)

    def unseal(self, number: int) -> None:
        """Nothing was done to it."""

    def settle(self, number: int) -> None:
        """Nothing is left over."""

    def usage(self, snapshot: Snapshot, check: Check) -> Usage:
        return trees.measure(self.tree(snapshot.number), check)

    def shown_labels(self, number: int) -> Mapping[str, str]:
        return {}

    def sync(self) -> None:
        with trees.trusted_directory(self.snapshots) as fd:
            _checked(_libc.syncfs(fd), self.snapshots)

    def entries(self) -> list[Entry]:
        found = ((name, _ENTRY.match(name)) for name in os.listdir(self.snapshots))
        return [Entry(name, int(match[1])) for name, match in found if match]

    def detach(self, number: int) -> None:
        with suppress(FileNotFoundError):
            os.rename(self.path(number), f"{self.snapshots}/rm-{number}")

    def set_aside(self, number: int) -> None:
        os.rename(self.path(number), f"{self.snapshots}/lost-{number}")

    def delete(self, name: str, check: Check) -> None:
        with trees.trusted_directory(self.snapshots) as fd:
            trees.remove(fd, name, check)
