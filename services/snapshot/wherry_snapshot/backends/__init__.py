"""The port of the snapshotters: what a backend has to do, and how one is found.

A backend makes, measures and removes directories named by number, and names mounts; it knows no keys, no namespaces
and no rows, and it never mounts. All its methods are synchronous, for a thread; `mounts` touches no disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol

from wherry_shared.api.snapshot import Kind, Usage
from wherry_shared.values import Mount

GROUP = "wherry.snapshotters"
"""Entry points of this group name a Factory each: distributions add snapshotters of their own."""
REBASE = "rebase"
"""Capability: a snapshot that was prepared without parent may be committed onto one."""

_OWN = (
    EntryPoint("native", "wherry_snapshot.backends.native:NativeBackend", GROUP),
    EntryPoint("overlay", "wherry_snapshot.backends.overlay:OverlayBackend", GROUP),
)

Check = Callable[[], None]
"""Called now and then by what takes long; raises an error of the house when it is to stop."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a backend is told of a snapshot.

    number: its directory's name, never used twice. parents: the committed ones below it, the nearest first.
    inherited: the labels that were handed down when it was prepared; later updates do not change them.
    """

    number: int
    kind: Kind
    parents: tuple[int, ...]
    inherited: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory that the backend made, whole or not: what it is called and for which number."""

    name: str
    number: int


class Backend(Protocol):
    """One way to keep snapshots on one root. Raises OSError where the disk refuses."""

    capabilities: frozenset[str]
    root: Path

    def create(self, snapshot: Snapshot, check: Check) -> None:
        """Make the directory of an active snapshot or a view: whole when this returns, absent when it raises."""
        ...

    def mounts(self, snapshot: Snapshot) -> list[Mount]:
        """How to mount an active snapshot or a view."""
        ...

    def rebase(self, number: int, parent: int | None, check: Check) -> None:
        """Fit what was prepared to be rebased to the parent that it is about to get, None: it becomes a base."""
        ...

    def usage(self, number: int, check: Check) -> Usage:
        """What a snapshot's directory takes now. Aborted when it changes too fast to be measured."""
        ...

    def entries(self) -> list[Entry]:
        """Every directory that this backend made and has not yet removed."""
        ...

    def detach(self, number: int) -> None:
        """Take the number off a directory, so that only its removal is left. One that is not there is no error."""
        ...

    def delete(self, name: str, check: Check) -> None:
        """Remove one entry with all that is in it, following and crossing nothing. Absent is no error."""
        ...


Factory = Callable[[Path, Mapping[str, str]], Backend]
"""Makes a backend: its own directory, the service's settings. FailedPrecondition: this host cannot have it."""


def available() -> dict[str, EntryPoint]:
    """Every snapshotter that is installed, by name; `load()` gives its Factory. Ours need no entry points."""
    return {e.name: e for e in (*entry_points(group=GROUP), *_OWN)}
