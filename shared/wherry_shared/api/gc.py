"""The garbage collection's own operations: between the lease service, which collects, and those that keep things.

Each of those serves a contract of the family `Collectable` beside its own. They belong to no namespace: a tenant never
reaches them. docs/decisions/0010 says why an epoch goes as it does.
"""

from __future__ import annotations

from typing import Protocol

from ..contract import Contract, endpoint
from ..errors import Aborted, FailedPrecondition, Unavailable
from ..values import Model
from .lease import Resource


class Activity(Model):
    """Whether anything was deleted since the last epoch began, and a number that grows with every event."""

    deletions: bool
    changes: int


class Collectable(Contract, Protocol):
    """One service's part in a collection. Pages and the dead are msgpack documents of `wherry_shared.collectable`."""

    @endpoint()
    async def activity(self) -> Activity:
        """Whether a collection is worth while."""
        ...

    @endpoint()
    async def begin(self, epoch: str, seconds: float) -> None:
        """Note from now on what changes, for at most `seconds`. An epoch that was under way ends."""
        ...

    @endpoint()
    async def nodes(self, after: bytes = b"") -> bytes:
        """A page of all records with what they refer to; its first item continues it, b"" says that it is the last."""
        ...

    @endpoint(FailedPrecondition)
    async def freeze(self, epoch: str, seconds: float) -> None:
        """Hold mutations until `thaw`, and no longer than `seconds`; reads go on."""
        ...

    @endpoint(FailedPrecondition)
    async def changed(self, epoch: str, after: int = 0) -> bytes:
        """A page of what changed since `begin`, as it is now, behind the sequence number `after`."""
        ...

    @endpoint(FailedPrecondition, mutates=True)
    async def sweep(self, epoch: str, dead: bytes) -> int:
        """Remove records, all or none; answers how many there were. FailedPrecondition: the freeze is over."""
        ...

    @endpoint()
    async def thaw(self, epoch: str) -> None:
        """Hold mutations no longer."""
        ...

    @endpoint()
    async def end(self, epoch: str) -> None:
        """Note changes no longer."""
        ...

    @endpoint(waits=True, timeout=600.0)
    async def reap(self) -> None:
        """Remove bytes and directories that no record names any more; back when they are gone."""
        ...


class ContentCollection(
    Collectable, Protocol, service="content-gc", version="1.0.0", namespaced=False, owner="content"
):
    """Blobs and ingests of every namespace."""


class SnapshotCollection(
    Collectable, Protocol, service="snapshot-gc", version="1.0.0", namespaced=False, owner="snapshot"
):
    """Snapshots of every snapshotter and namespace."""


class ImageCollection(Collectable, Protocol, service="image-gc", version="1.0.0", namespaced=False, owner="image"):
    """Images of every namespace."""


class ContainerCollection(
    Collectable, Protocol, service="container-gc", version="1.0.0", namespaced=False, owner="container"
):
    """Containers of every namespace; they are roots, and never dead."""


class Dead(Model):
    """One thing that is dead: what a lease would call it, and its namespace."""

    namespace: str
    resource: Resource


class Collected(Model):
    """What a collection did. removed: how many, by type of resource. kept: how many records live.

    seconds: how long all of it took. longest_wait: for how many seconds, at most, a mutation had to wait.
    dead: the first thousand, when it was only asked what would go.
    """

    removed: dict[str, int] = {}
    kept: int = 0
    seconds: float = 0.0
    longest_wait: float = 0.0
    dead: list[Dead] = []


class Collections(Contract, Protocol, service="gc", version="1.0.0", namespaced=False, owner="lease"):
    """The node's garbage collector."""

    @endpoint(Aborted, Unavailable, waits=True, timeout=600.0)
    async def collect(self, dry_run: bool = False) -> Collected:
        """Collect now, all namespaces, and wait until it is done. dry_run: only tell what would be removed.

        Unavailable: a service did not answer, so nothing (more) was removed; it is tried again later.
        """
        ...
