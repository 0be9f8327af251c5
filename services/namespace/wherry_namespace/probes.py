"""What is left of a namespace in the services that keep something in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from wherry_shared import context
from wherry_shared.api.container import Containers
from wherry_shared.api.content import Content
from wherry_shared.api.image import Images
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.bus import Bus
from wherry_shared.errors import DeadlineExceeded, Unavailable
from wherry_shared.values import Page

T = TypeVar("T")

PATIENCE = 3.0
"""Seconds within which every service has to answer."""


class Probes:
    """Asks every service at once. Leases and ingests do not count: they end by themselves."""

    def __init__(self, bus: Bus, *, patience: float = PATIENCE) -> None:
        self._bus = bus
        self._patience = patience

    async def __call__(self, namespace: str) -> list[str]:
        """What is left, in containerd's order. Unavailable, naming the service, when one does not answer in time."""
        images = self._bus.proxy(Images, namespace=namespace)
        content = self._bus.proxy(Content, namespace=namespace)
        containers = self._bus.proxy(Containers, namespace=namespace)
        snapshots = self._bus.proxy(Snapshots, namespace=namespace)
        kinds = ("images", "blobs", "containers", "snapshots")
        found = await asyncio.gather(
            self._holds("image", lambda: images.walk(limit=1)),
            self._holds("content", lambda: content.walk(limit=1)),
            self._holds("container", lambda: containers.walk(limit=1)),
            self._holds_snapshots(snapshots),
        )
        return [kind for kind, there in zip(kinds, found, strict=True) if there]

    async def _holds_snapshots(self, snapshots: Snapshots) -> bool:
        names = await self._ask("snapshot", snapshots.snapshotters)
        return any([await self._holds("snapshot", partial(snapshots.walk, name, limit=1)) for name in names])

    async def _holds(self, service: str, walk: Callable[[], Awaitable[Page[Any]]]) -> bool:
        page = await self._ask(service, walk)
        return bool(page.items or page.next)

    async def _ask(self, service: str, call: Callable[[], Awaitable[T]]) -> T:
        try:
            with context.use(timeout=self._patience, key=""):
                return await call()
        except (Unavailable, DeadlineExceeded) as e:
            raise Unavailable(f"whether the namespace is empty is unknown: the {service} service: {e}") from None
