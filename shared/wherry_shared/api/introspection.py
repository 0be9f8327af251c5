"""The introspection service: what runs here, which plugins, what they can (containerd's rules)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Protocol

from ..contract import Contract, endpoint
from ..errors import NotFound, Unavailable
from ..values import Model, Platform


class Server(Model):
    """The node. `id` is made once and kept; `boot_id` is the kernel's, and tells whether a caller is on this host.

    pid, pid_namespace (an inode number): the answering process's. time: its clock. root, state: the node's
    directories.
    """

    id: str
    node: str
    version: str
    started_at: datetime
    boot_id: str
    pid: int = 0
    pid_namespace: int = 0
    time: datetime | None = None
    root: str = ""
    state: str = ""


class Plugin(Model):
    """A backend or a service of the node, in containerd's terms.

    requires: the services that it calls. init_error: why it is not to be had; "" where it is.
    """

    type: str
    id: str
    requires: list[str] = []
    platforms: list[Platform] = []
    exports: dict[str, str] = {}
    capabilities: list[str] = []
    init_error: str = ""


class EndpointStatus(Model):
    """What one operation has answered. error_codes: how often which class of error."""

    name: str
    requests: int = 0
    errors: int = 0
    average_ns: int = 0
    error_codes: dict[str, int] = {}


class ServiceStatus(Model):
    """One live service process: what NATS micro discovery tells of it, and what it takes.

    version: the contract's. package: the installed distribution's. uptime: seconds. refused: requests that reached no
    operation, by the class of the error. rss, pss: bytes of memory, resident and its share. metrics: where Prometheus
    finds it, a URL or a socket's path.
    """

    name: str
    id: str
    version: str
    package: str = ""
    started_at: str = ""
    uptime: float = 0.0
    requests: int = 0
    errors: int = 0
    average_ns: int = 0
    error_codes: dict[str, int] = {}
    refused: dict[str, int] = {}
    endpoints: list[EndpointStatus] = []
    rss: int = 0
    pss: int = 0
    pid: int = 0
    metrics: str = ""


class Runtime(Model):
    """What a runtime's binary tells of itself.

    features: the OCI runtime features (runtime-spec features.md), {} where it has none to tell.
    """

    name: str
    path: str
    version: str = ""
    revision: str = ""
    features: dict[str, Any] = {}


class Introspection(Contract, Protocol, service="introspection", version="1.1.0", namespaced=False):
    """What runs here."""

    @endpoint()
    async def server(self) -> Server:
        """The node's identity."""
        ...

    @endpoint()
    async def plugins(self, filters: list[str] = []) -> list[Plugin]:
        """Every plugin that any filter (type, id) matches.

        Those that did not come up are there with their error, and so are services that do not answer.
        """
        ...

    @endpoint()
    async def services(self) -> list[ServiceStatus]:
        """Every service that is alive on the bus, with its statistics."""
        ...

    @endpoint(NotFound, Unavailable, timeout=20.0)
    async def runtime(self, name: str) -> Runtime:
        """A runtime by its plugin's id (type `io.containerd.runtime.v2`): its version and features.

        NotFound: the task service has none of that name, or this service does not see its binary. Unavailable: the
        binary does not tell.
        """
        ...
