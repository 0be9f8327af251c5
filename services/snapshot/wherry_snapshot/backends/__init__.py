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
REMAP_IDS = "remap-ids"
"""Capability: the labels UID_LABEL and GID_LABEL show a container its parents' files under other owners."""

OWN = (
    EntryPoint("btrfs", "wherry_snapshot.backends.btrfs:BtrfsBackend", GROUP),
    EntryPoint("erofs", "wherry_snapshot.backends.erofs:ErofsBackend", GROUP),
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
    """What the backend made for a snapshot, whole or not: its name, and for which number."""

    name: str
    number: int


class Backend(Protocol):
    """One way to keep snapshots on one root. Raises OSError where the disk refuses.

    A snapshot's way: `create`, then `mounts` any number of times; an active one may be committed, which is `seal`, the
    row, `settle`; at its end `detach` and `delete`. After a crash the row says how far it came: at the start every
    active one is unsealed and every committed one settled, so both have to be cheap where there is nothing to do.
    copies: whether an active snapshot on parents has a copy of their files, of which a power cut may take a part.
    No two calls for one number run at the same time, but for `mounts`, `usage` and the end.
    """

    capabilities: frozenset[str]
    copies: bool
    root: Path

    def create(self, snapshot: Snapshot, check: Check) -> None:
        """Make the directory of an active snapshot or a view: whole when this returns, absent when it raises."""
        ...

    def make_again(self, snapshot: Snapshot, check: Check) -> bool:
        """The power went after `create`: make again what it took of that, and leave all that is there.

        Answers whether anything was missing. FileNotFoundError: a parent is not there either.
        """
        ...

    def mounts(self, snapshot: Snapshot) -> list[Mount]:
        """How to mount an active snapshot or a view."""
        ...

    def seal(self, snapshot: Snapshot, rebase: bool, check: Check) -> Usage:
        """Make an active snapshot what it will be as a committed one, and measure it; `parents` are what it will have.

        rebase: it was prepared to get its parents now, or none after all. It may be repeated after a failure.
        """
        ...

    def unseal(self, number: int) -> None:
        """The commit came to nothing: the snapshot is active again. One not sealed, or not there, is no error."""
        ...

    def settle(self, number: int) -> None:
        """The commit is recorded: let go of what only the active snapshot needed. It may be repeated."""
        ...

    def usage(self, snapshot: Snapshot, check: Check) -> Usage:
        """What an active snapshot takes now, without its parents. Aborted when it changes too fast to be measured."""
        ...

    def shown_labels(self, number: int) -> Mapping[str, str]:
        """What is told of a snapshot besides its own labels; touches no disk."""
        ...

    def sync(self) -> None:
        """Back when everything that was written to the snapshots survives a power cut."""
        ...

    def entries(self) -> list[Entry]:
        """Every directory that this backend made and has not yet removed."""
        ...

    def detach(self, number: int) -> None:
        """Take the number off a directory, so that only its removal is left. One that is not there is no error."""
        ...

    def set_aside(self, number: int) -> None:
        """Rename a directory so that it is an entry no longer, and nothing but its owner ever removes it."""
        ...

    def delete(self, name: str, check: Check) -> None:
        """Remove one entry with all that is in it, following and crossing nothing. Absent is no error."""
        ...


Factory = Callable[[Path, Mapping[str, str]], Backend]
"""Makes a backend: its own directory, the service's settings. FailedPrecondition: this host cannot have it."""


def available() -> dict[str, EntryPoint]:
    """Every snapshotter that is installed, by name; `load()` gives its Factory. Ours need no entry points."""
    return {e.name: e for e in (*entry_points(group=GROUP), *OWN)}
