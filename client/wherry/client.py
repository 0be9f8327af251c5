"""`connect()` and the Client: one connection to the bus, one namespace, every service."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from wherry_shared import context
from wherry_shared.api.container import Containers
from wherry_shared.api.content import Content
from wherry_shared.api.diff import Diff
from wherry_shared.api.events import Envelope, Events
from wherry_shared.api.image import Images
from wherry_shared.api.introspection import Introspection
from wherry_shared.api.lease import EXPIRE_LABEL, Leases
from wherry_shared.api.namespace import Namespaces
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.api.task import Tasks
from wherry_shared.bus import Bus
from wherry_shared.bus import connect as connect_bus
from wherry_shared.bus.credentials import ADMIN, load
from wherry_shared.errors import AlreadyExists, Unavailable
from wherry_shared.runtime import NODE_FILE
from wherry_shared.values import Page, Platform, check_identifier, now

from .container import DEFAULT_SNAPSHOTTER, Container, NewContainer
from .image import Image
from .progress import OnProgress, silent

T = TypeVar("T")

DEFAULT_STATE = "/run/wherry"
DEFAULT_NAMESPACE = "default"
DEFAULTS = "containerd.io/defaults/"
LEASE_HOURS = 24


@dataclass(frozen=True)
class Address:
    """Where a node is and who we are there."""

    nats: str
    node: str
    creds: Path
    state: Path

    @classmethod
    def find(cls, *, state: str = "", nats: str = "", node: str = "", creds: str = "", role: str = ADMIN) -> Address:
        """Arguments win over `WHERRY_STATE/_NATS/_NODE/_CREDS`, those over what the node wrote into its state
        directory. Unavailable when neither tells where a node is."""
        directory = Path(state or os.environ.get("WHERRY_STATE", DEFAULT_STATE))
        nats, node = nats or os.environ.get("WHERRY_NATS", ""), node or os.environ.get("WHERRY_NODE", "")
        if not (nats and node):
            try:
                known: dict[str, Any] = json.loads((directory / NODE_FILE).read_text())
            except (OSError, ValueError):
                raise Unavailable(
                    f"no node runs on {directory}: start one with `wherry up`, or set WHERRY_STATE"
                ) from None
            nats, node = nats or known["nats"], node or known["node"]
        path = Path(creds or os.environ.get("WHERRY_CREDS", "") or directory / "creds" / f"{role}.nk")
        return cls(nats, node, path, directory)


class Client:
    """A namespace on a node, and every service there. Make one with `connect()`; close it, or use `async with`."""

    def __init__(self, bus: Bus, namespace: str, address: Address) -> None:
        self.bus = bus
        self.namespace = check_identifier(namespace, "namespace")
        self.address = address
        self.content = bus.proxy(Content, namespace=namespace)
        self.snapshots = bus.proxy(Snapshots, namespace=namespace)
        self.diff = bus.proxy(Diff, namespace=namespace)
        self.images = bus.proxy(Images, namespace=namespace)
        self.containers = bus.proxy(Containers, namespace=namespace)
        self.tasks = bus.proxy(Tasks, namespace=namespace)
        self.leases = bus.proxy(Leases, namespace=namespace)
        self.events = bus.proxy(Events, namespace=namespace)
        self.namespaces = bus.proxy(Namespaces)
        self.introspection = bus.proxy(Introspection)
        self._known_namespace = False

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect. What was started goes on running."""
        await self.bus.close()

    # ---- images

    async def pull(
        self,
        reference: str,
        *,
        unpack: bool = False,
        snapshotter: str = "",
        platform: Platform | None = None,
        insecure: Collection[str] = (),
        on_progress: OnProgress = silent,
    ) -> Image:
        """Fetch an image from a registry into content, record it, and with `unpack` make its snapshots.

        platform: this host's unless given. insecure: hosts (`host:port`) that may be spoken to in plain http;
        loopback may always. What an interrupted pull has fetched is used by the next.
        NotFound: no such image or platform. DataLoss: the registry sent something else than it announced.
        """
        from .pull import Pull

        await self.ensure_namespace()
        chosen = snapshotter or await self.default_snapshotter()
        async with self.lease():
            pull = Pull(self, reference, platform=platform, insecure=insecure, on_progress=on_progress)
            return await pull.run(unpack_to=chosen if unpack else "")

    async def image(self, name: str) -> Image:
        """An image by its name (`redis`, `docker.io/library/redis:alpine`). NotFound."""
        from .registry.reference import Reference

        return Image(self, await self.images.get(str(Reference.parse(name))))

    # ---- containers

    def new_container(self, id: str, image: Image | None = None, **options: Any) -> NewContainer:
        """Make a container: `await` it, or `async with` it to have it deleted with its snapshot at the end.

        Options are those of `wherry.container.NewContainer`.
        """
        return NewContainer(self, id, image, **options)

    async def container(self, id: str) -> Container:
        """A container by its id. NotFound."""
        return Container(self, await self.containers.get(id))

    # ---- what everything stands on

    @asynccontextmanager
    async def lease(self, hours: float = LEASE_HOURS) -> AsyncIterator[str]:
        """What is added inside is kept until the end, and no longer than `hours` if the end never comes."""
        expire = (now() + timedelta(hours=hours)).isoformat(timespec="seconds")
        lease = await self.leases.create(labels={EXPIRE_LABEL: expire})
        try:
            with context.use(lease=lease.id):
                yield lease.id
        finally:
            with context.use(lease="", timeout=5.0):
                await self.leases.delete(lease.id)

    async def ensure_namespace(self) -> None:
        """Make the namespace known before the first thing in it. A tenant's was made by an admin."""
        if self._known_namespace or self.address.creds.stem != ADMIN:
            return
        known = await walk(self.namespaces.walk, [f'name=="{self.namespace}"'])
        if not known:
            with contextlib.suppress(AlreadyExists):
                await self.namespaces.create(self.namespace)
        self._known_namespace = True

    async def default_snapshotter(self) -> str:
        """The namespace's label `containerd.io/defaults/snapshotter`, else `overlay`."""
        return (await self.defaults()).get("snapshotter", DEFAULT_SNAPSHOTTER)

    async def defaults(self) -> dict[str, str]:
        """What the namespace's labels `containerd.io/defaults/*` say; a tenant may not read them and has none."""
        if self.address.creds.stem != ADMIN:
            return {}
        namespace = await self.namespaces.get(self.namespace)
        return {k.removeprefix(DEFAULTS): v for k, v in namespace.labels.items() if k.startswith(DEFAULTS)}

    async def watch(
        self,
        *,
        since: datetime | None = None,
        filters: list[str] | None = None,
        all_namespaces: bool = False,
        follow: bool = True,
    ) -> AsyncIterator[Envelope]:
        """Events as they happen; with `since` first those of the past, without a hole between the two.

        follow: False ends it where the present begins.
        """
        from .watch import watch

        async for envelope in watch(
            self, since=since, filters=filters or [], all_namespaces=all_namespaces, follow=follow
        ):
            yield envelope


async def walk(
    window: Callable[..., Awaitable[Page[T]]], filters: list[str] | None = None, **arguments: Any
) -> list[T]:
    """Every item of a walk: `await walk(client.images.walk, ['name~=redis'])`."""
    items: list[T] = []
    after = ""
    while True:
        extra = {"filters": filters} if filters else {}
        page = await window(after=after, **extra, **arguments)
        items += page.items
        if not page.next:
            return items
        after = page.next


class _Connecting:
    """What `connect` answers: `await` it for a Client, or enter it with `async with`."""

    def __init__(self, address: Address, namespace: str) -> None:
        self._address = address
        self._namespace = namespace
        self._client: Client | None = None

    async def _connect(self) -> Client:
        own = load(self._address.creds)
        bus = await connect_bus(
            self._address.nats.split(","), node=self._address.node, name=f"{own.name}:{os.getpid()}", seed=own.seed,
            inbox_prefix=own.inbox_prefix,
        )  # fmt: skip
        return Client(bus, self._namespace, self._address)

    def __await__(self) -> Generator[Any, None, Client]:
        return self._connect().__await__()

    async def __aenter__(self) -> Client:
        self._client = await self._connect()
        return self._client

    async def __aexit__(self, *exc: object) -> None:
        if self._client is not None:
            await self._client.close()


def connect(*, namespace: str = "", state: str = "", nats: str = "", node: str = "", creds: str = "") -> _Connecting:
    """Connect to a node: `async with wherry.connect(namespace="cpuguy") as client:`.

    state: the node's state directory on this host (`WHERRY_STATE`, /run/wherry), which tells the rest. For a node
    elsewhere give `nats` (URLs, comma-separated), `node` and `creds` (a seed file).
    Unavailable: no node there. Unauthenticated: the credentials are missing or wrong.
    """
    address = Address.find(state=state, nats=nats, node=node, creds=creds)
    return _Connecting(address, namespace or os.environ.get("WHERRY_NAMESPACE", DEFAULT_NAMESPACE))
