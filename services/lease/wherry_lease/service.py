"""The edge of the lease service: the request's namespace, and the sweep."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from wherry_shared import context
from wherry_shared.api.lease import Lease, Leases, Resource
from wherry_shared.errors import WherryError
from wherry_shared.values import Page

from .leases import Registry

log = logging.getLogger("wherry.lease")


class LeaseService(Leases):
    """Leases of the namespace in the context."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def create(self, id: str = "", labels: dict[str, str] | None = None) -> Lease:
        return await self._registry.create(context.namespace(), id, labels or {})

    async def delete(self, id: str) -> None:
        await self._registry.delete(context.namespace(), id)

    async def get(self, id: str) -> Lease:
        return self._registry.get(context.namespace(), id)

    async def walk(self, filters: Sequence[str] = (), after: str = "", limit: int = 1000) -> Page[Lease]:
        return await self._registry.walk(context.namespace(), filters, after, limit)

    async def add_resource(self, id: str, resource: Resource) -> None:
        await self._registry.add_resource(context.namespace(), id, resource)

    async def delete_resource(self, id: str, resource: Resource) -> None:
        await self._registry.delete_resource(context.namespace(), id, resource)

    async def resources(self, id: str) -> list[Resource]:
        return self._registry.resources(context.namespace(), id)


class Sweeper:
    """Removes void leases every `interval` seconds."""

    def __init__(self, registry: Registry, interval: float) -> None:
        self._registry = registry
        self._interval = interval
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._sweep())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _sweep(self) -> None:
        while True:
            try:
                removed = await self._registry.sweep()
                if removed:
                    log.info("%d leases whose time has passed are removed", removed)
            except WherryError as e:
                log.warning("void leases stay for now: %s", e)
            await asyncio.sleep(self._interval)
