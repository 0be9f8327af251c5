"""A service must implement the whole contract, with the contract's types."""

from __future__ import annotations

from typing import Protocol

from wherry_shared.api.introspection import Introspection, Plugin, Server, ServiceStatus
from wherry_shared.bus import Bus
from wherry_shared.contract import Contract, endpoint
from wherry_shared.errors import NotFound
from wherry_shared.values import Descriptor, Mount


class Layers(Contract, Protocol, service="layers", version="1.0.0"):
    @endpoint(NotFound, mutates=True)
    async def apply(self, descriptor: Descriptor, mounts: list[Mount], standalone: bool = False) -> Descriptor:
        """A contract of somebody's own."""
        ...


class Whole(Layers):
    async def apply(self, descriptor: Descriptor, mounts: list[Mount], standalone: bool = False) -> Descriptor:
        return descriptor


class Partial(Introspection):
    async def server(self) -> Server:
        raise NotImplementedError

    async def plugins(self, filters: list[str] = []) -> list[Plugin]:  # noqa: B006
        return []


class Narrower(Layers):
    async def apply(self, descriptor: Descriptor, mounts: list[Mount]) -> Descriptor:  # type: ignore[override]
        return descriptor


class Other(Introspection):
    async def services(self) -> list[Plugin]:  # type: ignore[override]
        return []


class Lookalike:
    """Does not inherit the contract: it would have no endpoints."""

    async def apply(self, descriptor: Descriptor, mounts: list[Mount], standalone: bool = False) -> Descriptor:
        return descriptor


async def serve(bus: Bus, status: ServiceStatus) -> None:
    await bus.serve(Whole())
    Partial()  # type: ignore[abstract]
    Other()  # type: ignore[abstract]
    await bus.serve(Lookalike())  # type: ignore[arg-type]
    await bus.serve(Whole)  # type: ignore[arg-type]
    status.pid.upper()  # type: ignore[attr-defined]
