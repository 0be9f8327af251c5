"""The container service: container metadata, and nothing that runs (containerd's rules)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Protocol

from ..contract import Contract, endpoint
from ..errors import AlreadyExists, NotFound
from ..records import Record, record
from ..values import Identifier, Labels, Page

JOIN_LABEL = "wherry/join."
"""`wherry/join.<kind>`: whose namespace a container shares; its path in the specification is written anew for each
task."""


@record
class Runtime(Record):
    """The OCI runtime that runs the container's task: a name known to the task service, or a path it allows."""

    name: str
    options: dict[str, Any] = {}


@record
class Container(Record):
    """A container: what its task will be made of. `spec` is an OCI runtime specification.

    tenant: who said what it is made of, if that was a tenant; the service's word, as the times are. Whoever starts it,
    its task is held against what that tenant may run.
    """

    id: Identifier
    labels: Labels = {}
    image: str = ""
    runtime: Runtime
    spec: dict[str, Any] | None = None
    snapshotter: str = ""
    snapshot_key: str = ""
    extensions: dict[str, Any] = {}
    sandbox: str = ""
    created_at: datetime | None = None
    updated_at: datetime | None = None
    tenant: str = ""


EVENTS = {
    "/containers/create": "id image runtime{name options}",
    "/containers/update": "id image labels snapshot_key",
    "/containers/delete": "id",
}


class Containers(Contract, Protocol, service="container", version="1.1.0", events=EVENTS):
    """The containers of one namespace."""

    @endpoint(NotFound)
    async def get(self, id: Identifier) -> Container:
        """One container."""
        ...

    @endpoint()
    async def walk(
        self, filters: list[str] = [], after: str = "", limit: int = 1000, spec: bool = True
    ) -> Page[Container]:
        """A window of the containers that any filter matches, in order of their ids.

        spec: False leaves the specifications out (None), which are nearly all of the bytes.
        """
        ...

    @endpoint(AlreadyExists, mutates=True)
    async def create(self, container: Container) -> Container:
        """Record a container; its times are the service's. A snapshot key needs a snapshotter."""
        ...

    @endpoint(NotFound, mutates=True)
    async def update(self, container: Container, mask: list[str] = []) -> Container:
        """Change a container. `mask`: `labels`, `labels.<key>`, `spec`, `extensions`, `extensions.<key>`, `image`,
        `snapshot_key`; empty replaces these, and snapshotter and runtime name must then be the old ones."""
        ...

    @endpoint(NotFound, mutates=True)
    async def delete(self, id: Identifier) -> None:
        """Forget a container. Whether its task still runs is the caller's to check."""
        ...
