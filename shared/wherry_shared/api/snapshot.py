"""The snapshot service: filesystem snapshots as mounts that somebody else mounts (containerd's rules)."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, Protocol

from ..contract import Contract, endpoint
from ..errors import AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted
from ..records import Record, record
from ..values import Labels, Model, Mount, Name, Page

Kind = Literal["active", "view", "committed"]
REF_LABEL = "containerd.io/snapshot.ref"
INHERITED_PREFIX = "containerd.io/snapshot/"
REBASE_LABEL = "containerd.io/snapshot/rebase"
"""On `prepare` of a snapshot without parent: it holds one layer of a stack and will be committed onto its parent."""
UID_LABEL = "containerd.io/snapshot/uidmapping"
GID_LABEL = "containerd.io/snapshot/gidmapping"
"""Both on `prepare` or `view`, `containerID:hostID:size[,...]`: show the parents' files under other owners."""
UPPERDIR_LABEL = "containerd.io/snapshot/overlay.upperdir"
"""Told of overlay's snapshots where its setting `upperdir_label` is on; never stored."""


@record
class Info(Record):
    """One snapshot. `parent` is "" for a base."""

    kind: Kind
    name: str
    parent: str = ""
    labels: dict[str, str] = {}
    created_at: datetime
    updated_at: datetime


class Usage(Model):
    """What a snapshot takes by itself, without its parents: bytes on disk and inodes."""

    size: int
    inodes: int


EVENTS = {
    "/snapshot/prepare": "key parent snapshotter",
    "/snapshot/commit": "key name snapshotter",
    "/snapshot/remove": "key snapshotter",
}


class Snapshots(Contract, Protocol, service="snapshot", version="1.0.0", events=EVENTS):
    """The snapshots of one namespace. Active keys and committed names share one key space per snapshotter."""

    @endpoint(AlreadyExists, NotFound, FailedPrecondition, ResourceExhausted, mutates=True, timeout=60.0)
    async def prepare(self, snapshotter: str, key: Name, parent: str = "", labels: Labels = {}) -> list[Mount]:
        """Make an active snapshot on a committed parent ("": empty) and answer its mounts.

        FailedPrecondition: its labels ask for what the snapshotter cannot do here (`rebase`, `remap-ids`).
        """
        ...

    @endpoint(AlreadyExists, NotFound, FailedPrecondition, ResourceExhausted, mutates=True, timeout=60.0)
    async def view(self, snapshotter: str, key: Name, parent: str = "", labels: Labels = {}) -> list[Mount]:
        """Make a read-only snapshot on a committed parent and answer its mounts."""
        ...

    @endpoint(NotFound, FailedPrecondition)
    async def mounts(self, snapshotter: str, key: Name) -> list[Mount]:
        """The mounts of an active snapshot or a view."""
        ...

    @endpoint(AlreadyExists, NotFound, FailedPrecondition, ResourceExhausted, mutates=True, timeout=60.0)
    async def commit(
        self, snapshotter: str, name: Name, key: Name, parent: str = "", labels: Labels = {}, patience: float = 0.0
    ) -> Info:
        """Turn the active snapshot `key` into the committed `name`; `key` is gone. Labels are those of this call.

        parent: put a parentless active snapshot onto this parent, where the snapshotter can `rebase`. patience: wait
        so many seconds, 50 at most, for that parent to be committed.
        """
        ...

    @endpoint(NotFound, FailedPrecondition, mutates=True, timeout=60.0)
    async def remove(self, snapshotter: str, key: Name) -> None:
        """Remove a snapshot. FailedPrecondition while others stand on it."""
        ...

    @endpoint(NotFound)
    async def stat(self, snapshotter: str, key: Name) -> Info:
        """One snapshot."""
        ...

    @endpoint(NotFound, mutates=True)
    async def update(self, snapshotter: str, key: Name, labels: Labels, mask: list[str] = []) -> Info:
        """Change labels. `mask`: `labels` or `labels.<key>`; empty replaces all."""
        ...

    @endpoint()
    async def walk(self, snapshotter: str, filters: list[str] = [], after: str = "", limit: int = 1000) -> Page[Info]:
        """A window of the snapshots that any filter matches, in order of their names."""
        ...

    @endpoint(NotFound, timeout=60.0)
    async def usage(self, snapshotter: str, key: Name) -> Usage:
        """What a snapshot takes: measured now when active, as stored at commit otherwise."""
        ...

    @endpoint()
    async def snapshotters(self) -> list[str]:
        """The names of the snapshotters that this host has."""
        ...

    @endpoint(mutates=True, timeout=60.0)
    async def cleanup(self, snapshotter: str) -> None:
        """Remove directories that no snapshot owns."""
        ...
