"""The lease service: what is kept while work is under way (containerd's rules)."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from ..contract import Contract, endpoint
from ..errors import AlreadyExists, NotFound, Unimplemented
from ..records import Record, record
from ..values import Labels, Page

EXPIRE_LABEL = "containerd.io/gc.expire"
RESOURCES_MAX = 1000


@record
class Lease(Record):
    """A lease. The label `containerd.io/gc.expire` (RFC 3339) says when it is void."""

    id: str
    labels: Labels = {}
    created_at: datetime


@record
class Resource(Record):
    """What a lease keeps. type: `content` (id: digest), `ingests` (ref), `images` (name), `snapshots/<snapshotter>`
    (key)."""

    type: str
    id: str


class Leases(Contract, Protocol, service="lease", version="1.0.0"):
    """The leases of one namespace."""

    @endpoint(AlreadyExists, mutates=True)
    async def create(self, id: str = "", labels: Labels = {}) -> Lease:
        """Make a lease; without an id the service makes one."""
        ...

    @endpoint(NotFound, mutates=True, timeout=60.0)
    async def delete(self, id: str, sync: bool = False) -> None:
        """End a lease.

        sync: wait until everything that only it kept is collected. Unavailable then: the lease is gone, and the
        collection failed and is tried again later.
        """
        ...

    @endpoint(NotFound)
    async def get(self, id: str) -> Lease:
        """One lease that has not expired."""
        ...

    @endpoint()
    async def walk(self, filters: list[str] = [], after: str = "", limit: int = 1000) -> Page[Lease]:
        """A window of the leases that any filter (id, labels.*) matches, in order of their ids."""
        ...

    @endpoint(NotFound, Unimplemented, mutates=True)
    async def add_resource(self, id: str, resource: Resource) -> None:
        """Keep a thing, whether it exists yet or not; keeping it twice is keeping it once."""
        ...

    @endpoint(NotFound, Unimplemented, mutates=True)
    async def add_resources(self, id: str, resources: list[Resource]) -> None:
        """Keep several things, at most RESOURCES_MAX, or none of them where one is refused."""
        ...

    @endpoint(NotFound, Unimplemented, mutates=True)
    async def delete_resource(self, id: str, resource: Resource) -> None:
        """Keep a thing no longer."""
        ...

    @endpoint(NotFound)
    async def resources(self, id: str, after: str = "", limit: int = 1000) -> Page[Resource]:
        """A window of what a lease keeps, in order of type and id."""
        ...
