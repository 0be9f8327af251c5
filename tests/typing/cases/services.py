"""A service must implement the whole contract, with the contract's types."""

from __future__ import annotations

from wherry_shared.api.diff import Diff
from wherry_shared.api.introspection import Introspection, Plugin, Server, ServiceStatus
from wherry_shared.bus import Bus
from wherry_shared.values import Descriptor, Mount


class Whole(Diff):
    async def apply(self, descriptor: Descriptor, mounts: list[Mount], standalone: bool = False) -> Descriptor:
        return descriptor


class Partial(Introspection):
    async def server(self) -> Server:
        raise NotImplementedError

    async def plugins(self, filters: list[str] = []) -> list[Plugin]:  # noqa: B006
        return []


class Narrower(Diff):
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
