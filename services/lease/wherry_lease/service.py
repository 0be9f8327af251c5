"""The edge of the lease service: the request's namespace, and the sweep."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from wherry_shared import context
from wherry_shared.api.gc import Collected, Collections
from wherry_shared.api.lease import Lease, Leases, Resource
from wherry_shared.errors import WherryError
from wherry_shared.values import Page

from .leases import Registry
from .scheduler import Scheduler

log = logging.getLogger("wherry.lease")


class LeaseService(Leases):
    """Leases of the namespace in the context. scheduler: of the collector; without one nothing is collected."""

    def __init__(self, registry: Registry, scheduler: Scheduler | None = None) -> None:
        self._registry = registry
        self._scheduler = scheduler

    async def create(self, id: str = "", labels: dict[str, str] | None = None) -> Lease:
        return await self._registry.create(context.namespace(), id, labels or {})

    async def delete(self, id: str, sync: bool = False) -> None:
        replayed: context.Replayed | None = None
        try:
            await self._registry.delete(context.namespace(), id)
        except context.Replayed as e:  # it is gone already; whether it was collected then, nobody knows
            replayed = e
        if self._scheduler is not None:
            self._scheduler.deleted()
            if sync:
                await self._scheduler.collect()
        if replayed is not None:
            raise replayed

    async def get(self, id: str) -> Lease:
        return self._registry.get(context.namespace(), id)

    async def walk(self, filters: Sequence[str] = (), after: str = "", limit: int = 1000) -> Page[Lease]:
        return await self._registry.walk(context.namespace(), filters, after, limit)

    async def add_resource(self, id: str, resource: Resource) -> None:
        await self._registry.add_resources(context.namespace(), id, [resource])

    async def add_resources(self, id: str, resources: Sequence[Resource]) -> None:
        await self._registry.add_resources(context.namespace(), id, resources)

    async def delete_resource(self, id: str, resource: Resource) -> None:
        await self._registry.delete_resource(context.namespace(), id, resource)
        by_service = context.current().identity.role == "service"  # it takes off what is gone anyway
        if self._scheduler is not None and not by_service:
            self._scheduler.deleted()

    async def resources(self, id: str, after: str = "", limit: int = 1000) -> Page[Resource]:
        return self._registry.resources(context.namespace(), id, after, limit)


class CollectionService(Collections):
    """The garbage collector's own operations."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def collect(self, dry_run: bool = False) -> Collected:
        return await self._scheduler.collect(dry_run=dry_run)


class Sweeper:
    """Removes void leases every `interval` seconds, and tells of it."""

    def __init__(self, registry: Registry, interval: float, on_removed: Callable[[], None] = lambda: None) -> None:
        self._registry = registry
        self._interval = interval
        self._on_removed = on_removed
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
                    self._on_removed()
            except WherryError as e:
                log.warning("void leases stay for now: %s", e)
            await asyncio.sleep(self._interval)
