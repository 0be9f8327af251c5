"""The bus: the only package of the house that speaks NATS.

`connect()` gives a Bus; `bus.serve(implementation)` serves a contract on it and `bus.proxy(Contract)` calls one.
"""

from __future__ import annotations

import importlib
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from typing_extensions import TypeForm

from ..context import Identity
from ..contract import Contract
from . import discovery, events
from .events import Subscriber
from .proxy import Caller, make_proxy
from .serve import IdentityOf, Server
from .shortcut import Shortcut
from .transport import Transport

C = TypeVar("C")

__all__ = ["Bus", "Subscriber", "connect", "discovery", "events"]

DIRECT = "WHERRY_DIRECT"
ADMIN = Identity("admin", "admin")


def _admin_only(reply: str) -> Identity | None:
    return ADMIN


class Bus:
    """One process's place on the bus."""

    def __init__(
        self, transport: Transport, *, node: str, identity_of: IdentityOf = _admin_only, direct: Path | None = None
    ) -> None:
        """direct: the node's state directory on this host, for what is served here to have sockets there."""
        self.transport = transport
        self.node = node
        self._direct = direct
        self._identity_of = identity_of
        self._servers: list[Server] = []

    async def serve(
        self, implementation: Contract, *, node: str = "", instance: str = "", metadata: dict[str, str] | None = None
    ) -> Server:
        """Serve a contract's implementation: its operations are answered when this returns."""
        server = Server(
            self.transport, implementation, node=node or self.node, instance=instance or secrets.token_hex(8),
            identity_of=self._identity_of, metadata=metadata or {},
        )  # fmt: skip
        await server.start()
        await self.transport.flush()
        self._servers.append(server)
        if self._direct is not None:
            from .direct import open_door

            open_door(server, self._direct, self._identity_of)
        return server

    @property
    def servers(self) -> Sequence[Server]:
        """What is served here."""
        return self._servers

    def proxy(self, contract: TypeForm[C], *, node: str = "", namespace: str = "", instance: str = "") -> C:
        """An object whose methods are the contract's operations over the bus.

        namespace: of every call; the context's where it is "". instance: one replica instead of any.
        """
        caller = Caller(self, node=node or self.node, namespace=namespace, instance=instance)
        made: C = make_proxy(contract, caller)  # type: ignore[arg-type]
        return made

    async def subscribe(
        self, *, node: str = "*", namespace: str = "*", topic: str = "", limit: int = 65536
    ) -> Subscriber:
        """Events from now on; `topic` (`/tasks/exit`) or "" for all."""
        subscriber = Subscriber(limit)
        await subscriber.start(self.transport, events.pattern(node, namespace, topic))
        return subscriber

    async def drain(self, timeout: float = 10.0) -> None:
        """End every service that this process serves, in good order."""
        for server in self._servers:
            await server.drain(timeout)
        self._servers = []

    async def close(self) -> None:
        """Drain and disconnect."""
        await self.drain()
        await self.transport.close()


def load_connection() -> ModuleType:
    """The module that speaks NATS, loaded when first needed.

    nats-py loads aiohttp where it finds it, for WebSockets that are not spoken here: a tenth of a second in every
    command line and megabytes in every service. While it loads, there is none.
    """
    hidden = "aiohttp" not in sys.modules
    if hidden:
        sys.modules["aiohttp"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(".connection", __name__)
    finally:
        if hidden:
            del sys.modules["aiohttp"]


async def connect(
    servers: list[str], *, node: str, name: str, seed: bytes, inbox_prefix: str, identity_of: IdentityOf = _admin_only,
    direct: Path | None = None, awake: bool = False,
) -> Bus:  # fmt: skip
    """Connect to NATS with an nkey seed. Unavailable, Unauthenticated or FailedPrecondition (server too old).

    direct: the node's state directory, where it is on this host: requests to its services, and what is served here,
    then take the direct path. `WHERRY_DIRECT=0` says never. awake: as of Shortcut; for callers that serve nobody.
    """
    Connection = load_connection().Connection  # noqa: N806 - a class
    transport: Transport = await Connection.connect(servers, name=name, seed=seed, inbox_prefix=inbox_prefix)
    if direct is None or os.environ.get(DIRECT) == "0":
        return Bus(transport, node=node, identity_of=identity_of)
    return Bus(Shortcut(transport, direct, awake=awake), node=node, identity_of=identity_of, direct=direct)
