"""Every service that a garbage collection concerns, in this process, on one bus and one root.

    async with House(bus, tmp_path) as house:
        await house.collector.collect()

Nothing is collected but when it is asked for, unless the lease service's settings say otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from rebuilt import event_stream
from wherry_container.__main__ import build as build_container
from wherry_content.__main__ import build as build_content
from wherry_image.__main__ import build as build_image
from wherry_lease.__main__ import build as build_lease
from wherry_shared import context
from wherry_shared.api.container import Containers
from wherry_shared.api.content import Content
from wherry_shared.api.gc import Collections
from wherry_shared.api.image import Image, Images
from wherry_shared.api.lease import Leases
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.bus import Bus
from wherry_shared.bus.serve import Server
from wherry_shared.errors import AlreadyExists
from wherry_shared.runtime import Host, Settings
from wherry_shared.values import Descriptor
from wherry_snapshot.__main__ import build as build_snapshot

Build = Callable[[Host], Awaitable[Any]]
BUILDS: Mapping[str, Build] = {
    "container": build_container, "content": build_content, "image": build_image, "snapshot": build_snapshot,
    "lease": build_lease,
}  # fmt: skip
SNAPSHOTTER = "native"
CONFIG = "application/vnd.oci.image.config.v1+json"


class House:
    """The five services; each can be stopped and built again on the same root."""

    def __init__(self, bus: Bus, root: Path, **options: dict[str, str]) -> None:
        self.bus, self.root = bus, root
        self.options = {"lease": {"startup_delay": "3600"}, **options}
        self._stacks: dict[str, AsyncExitStack] = {}
        self._servers: dict[str, list[Server]] = {}
        self.collector = bus.proxy(Collections)

    async def __aenter__(self) -> House:
        await event_stream(self.bus)
        for name in BUILDS:
            await self.start(name)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for name in [*self._stacks][::-1]:
            await self.stop(name)

    async def start(self, name: str) -> None:
        stack = self._stacks[name] = AsyncExitStack()
        root = self.root / "root"
        place = await self.bus.of(name) if hasattr(self.bus, "of") else self.bus  # over NATS each is its own user
        settings = Settings(
            name, self.bus.node, root, self.root / "state", "", root, options=self.options.get(name, {})
        )
        host = Host(settings, place, stack)
        service = await BUILDS[name](host)
        self._servers[name] = [await self.bus.serve(s, instance=host.instance) for s in (*host.also, service)]

    async def stop(self, name: str, patience: float = 10.0) -> None:
        for server in self._servers.pop(name):
            await server.drain(patience)
        await self._stacks.pop(name).aclose()

    async def kill(self, name: str) -> None:
        """Requests that are under way get no answer; what is committed stays."""
        await self.stop(name, 0.0)

    def of(self, namespace: str) -> Client:
        return Client(self.bus, namespace)


class Client:
    """One namespace's proxies, and the things that tests make."""

    def __init__(self, bus: Bus, namespace: str = "default") -> None:
        self.content = bus.proxy(Content, namespace=namespace)
        self.snapshots = bus.proxy(Snapshots, namespace=namespace)
        self.images = bus.proxy(Images, namespace=namespace)
        self.containers = bus.proxy(Containers, namespace=namespace)
        self.leases = bus.proxy(Leases, namespace=namespace)

    async def blob(self, name: str, lease: str = "", **labels: str) -> str:
        """A blob whose bytes are its name; labels without `containerd.io/gc.`."""
        digest = digest_of(name)
        with context.use(lease=lease):
            try:
                await self.content.put(name.encode(), digest, gc(labels))
            except AlreadyExists:
                await self.content.update(digest, gc(labels))
        return digest

    async def label_blob(self, name: str, **labels: str) -> None:
        await self.content.update(digest_of(name), gc(labels))

    async def image(self, name: str, target: str, **labels: str) -> None:
        """An image that points at the blob `target`; made anew where it is there."""
        descriptor = Descriptor(media_type=CONFIG, digest=digest_of(target), size=len(target))
        image = Image(name=name, target=descriptor, labels=gc(labels))
        try:
            await self.images.create(image)
        except AlreadyExists:
            await self.images.update(image)

    async def snapshot(
        self, key: str, parent: str = "", lease: str = "", *, commit: bool = True, **labels: str
    ) -> None:
        with context.use(lease=lease):
            if not commit:
                await self.snapshots.prepare(SNAPSHOTTER, key, parent, gc(labels))
                return
            await self.snapshots.prepare(SNAPSHOTTER, f"{key}-active", parent)
            await self.snapshots.commit(SNAPSHOTTER, key, f"{key}-active", labels=gc(labels))

    async def there(self) -> set[str]:
        """What there is: `blob:name` by `names`, `image:`, `snapshot:`, `ingest:`, `lease:`."""
        found = {f"image:{i.name}" for i in (await self.images.walk()).items}
        found |= {f"blob:{i.digest}" for i in (await self.content.walk()).items}
        found |= {f"ingest:{i.ref}" for i in await self.content.statuses()}
        found |= {f"snapshot:{i.name}" for i in (await self.snapshots.walk(SNAPSHOTTER)).items}
        found |= {f"lease:{i.id}" for i in (await self.leases.walk()).items}
        return found


def gc(labels: Mapping[str, str]) -> dict[str, str]:
    """`ref_content` stands for `containerd.io/gc.ref.content`; two underscores for a slash."""
    return {f"containerd.io/gc.{k.replace('__', '/').replace('_', '.')}": v for k, v in labels.items()}


def digest_of(name: str) -> str:
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"


def blobs(*names: str) -> set[str]:
    return {f"blob:{digest_of(name)}" for name in names}
