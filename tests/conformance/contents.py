"""A content service with what it asks, leases and namespaces, on any backend: what the content suites act on."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rebuilt import event_stream
from wherry_content import backends, metadata
from wherry_content.metadata import Metadata
from wherry_content.service import ContentService
from wherry_content.sharing import Policy, Sharing
from wherry_content.store import Store
from wherry_lease import metadata as lease_metadata
from wherry_lease.leases import Registry as LeaseRegistry
from wherry_lease.service import LeaseService
from wherry_namespace import metadata as namespace_metadata
from wherry_namespace.probes import Probes
from wherry_namespace.registry import Registry as NamespaceRegistry
from wherry_namespace.service import NamespaceService
from wherry_shared.api.content import CHUNK, Content, Info, Opened
from wherry_shared.api.lease import Leases
from wherry_shared.api.namespace import Namespaces
from wherry_shared.bus import Bus
from wherry_shared.bus.proxy import at_instance
from wherry_shared.outbox import Outbox
from wherry_shared.sqlite import Database

NONE = f"sha256:{'0' * 64}"


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


class House:
    """The services on one bus; they can be stopped and built again on the same root."""

    def __init__(
        self, bus: Bus, root: Path, backend: str, policy: Policy = Policy.isolated, idle: float = 600.0
    ) -> None:
        self.bus, self.root, self.policy, self.idle = bus, root, policy, idle
        self.backend = backends.find(backend)(root / "content")

    async def start(self) -> None:
        self.databases = [
            await Database.open(self.root / "content" / "metadata.db", metadata.MIGRATIONS),
            await Database.open(self.root / "lease.db", lease_metadata.MIGRATIONS),
            await Database.open(self.root / "namespace.db", namespace_metadata.MIGRATIONS),
        ]
        self.outbox = Outbox(self.databases[0], self.bus)
        self.outbox.start()
        await self.bus.serve(LeaseService(LeaseRegistry(lease_metadata.Rows(self.databases[1]))))
        namespaces = NamespaceRegistry(namespace_metadata.table(self.databases[2]), Probes(self.bus))
        self.namespaces = await self.bus.serve(NamespaceService(namespaces))
        rows = Metadata(self.databases[0])
        sharing = Sharing(rows, self.policy, self.bus.proxy(Namespaces))
        self.store = Store(rows, self.backend, instance="one", idle=self.idle, sharing=sharing)
        await self.store.start()
        self.server = await self.bus.serve(ContentService(self.store, self.bus.proxy(Leases)), instance="one")

    async def stop(self) -> None:
        await self.bus.drain()
        await self.store.stop()
        await self.outbox.stop()
        for database in self.databases:
            await database.close()

    def requests(self, operation: str) -> int:
        """How many requests of an operation of content have come over the bus."""
        return self.server.stats[operation].requests

    def content(self, namespace: str) -> Content:
        return self.bus.proxy(Content, namespace=namespace)


@asynccontextmanager
async def built(
    bus: Bus, root: Path, backend: str, policy: Policy = Policy.isolated, idle: float = 600.0
) -> AsyncIterator[House]:
    """A house on a fresh root, and the stream that takes its events. idle: as of Store."""
    await event_stream(bus)
    house = House(bus, root, backend, policy, idle)
    await house.start()
    try:
        yield house
    finally:
        await house.stop()


async def opened_writer(
    content: Content, ref: str, data: bytes, expected: str = "", total: int = 0
) -> tuple[Opened, Content]:
    """An ingest that holds `data`, and the proxy of the instance that holds it."""
    opened = await content.open(ref, total=total, expected=expected)
    writer = at_instance(content, opened.instance)
    offset = opened.offset
    while offset < len(data):
        offset = await writer.write(ref, offset, data[offset : offset + CHUNK])
    return opened, writer


async def put(content: Content, data: bytes, **labels: str) -> Info:
    """A blob, by way of an ingest."""
    _, writer = await opened_writer(content, "put", data)
    return await writer.commit("put", len(data), digest_of(data), labels)
