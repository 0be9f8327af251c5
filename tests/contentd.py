"""A content service for tests: a replica on a root and a bus, that can be stopped and built again."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

from housebus import PATIENCE
from wherry_content import backends, metadata
from wherry_content.metadata import Metadata
from wherry_content.service import ContentService
from wherry_content.store import Store
from wherry_shared.api.content import Content
from wherry_shared.api.lease import Leases
from wherry_shared.bus import Bus
from wherry_shared.bus.proxy import at_instance
from wherry_shared.bus.serve import Server
from wherry_shared.sqlite import Database


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


class Replica:
    """One content service on `root`. `service` may be a subclass of ContentService that misbehaves."""

    def __init__(
        self, bus: Bus, root: Path, instance: str = "one", *, backend: str = "local", idle: float = 60.0,
        service: type[ContentService] = ContentService,
    ) -> None:  # fmt: skip
        self.bus, self.root, self.instance, self.idle = bus, root, instance, idle
        self.backend: Any = backends.find(backend)(root)
        self.service_class = service
        self.server: Server | None = None

    async def start(self) -> None:
        self.database = await Database.open(self.root / "metadata.db", metadata.MIGRATIONS)
        self.store = Store(Metadata(self.database), self.backend, instance=self.instance, idle=self.idle)
        await self.store.start()
        self.service = self.service_class(self.store, self.bus.proxy(Leases))
        self.server = await self.bus.serve(self.service, instance=self.instance)

    async def stop(self) -> None:
        """Leave the bus and let go of everything."""
        if self.server is not None:
            await self.server.drain(2.0)
            self.server = None
            await self.store.stop()
            await self.database.close()

    async def restart(self) -> None:
        await self.stop()
        self.backend = type(self.backend)(self.root)
        await self.start()

    @property
    def content(self) -> Content:
        return self.bus.proxy(Content, namespace="default")

    def requests(self, operation: str) -> int:
        """How many requests of an operation have come over the bus."""
        assert self.server is not None
        return self.server.stats[operation].requests


async def ready(content: Content, instance: str) -> None:
    """Return when that instance, a process, answers."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await at_instance(content, instance).statuses()
                return
            except Exception:
                await asyncio.sleep(0.05)
