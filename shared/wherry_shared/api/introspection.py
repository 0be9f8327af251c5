"""The introspection service: what runs here, which plugins, what they can (containerd's rules)."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from ..contract import Contract, endpoint
from ..values import Model, Platform


class Server(Model):
    """The node. `id` is made once and kept; `boot_id` is the kernel's, and tells whether a caller is on this host."""

    id: str
    node: str
    version: str
    started_at: datetime
    boot_id: str


class Plugin(Model):
    """A backend or a service of the node, in containerd's terms."""

    type: str
    id: str
    platforms: list[Platform] = []
    exports: dict[str, str] = {}
    capabilities: list[str] = []
    init_error: str = ""


class ServiceStatus(Model):
    """One live service process: what NATS micro discovery tells of it."""

    name: str
    id: str
    version: str
    started_at: str = ""
    requests: int = 0
    errors: int = 0
    average_ns: int = 0
    pid: int = 0


class Introspection(Contract, Protocol, service="introspection", version="1.0.0", namespaced=False):
    """What runs here."""

    @endpoint()
    async def server(self) -> Server:
        """The node's identity."""
        ...

    @endpoint()
    async def plugins(self, filters: list[str] = []) -> list[Plugin]:
        """Every plugin of every live service that any filter (type, id) matches."""
        ...

    @endpoint()
    async def services(self) -> list[ServiceStatus]:
        """Every service that is alive on the bus, with its statistics."""
        ...
