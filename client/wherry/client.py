"""`connect()` and the Client: one connection to the bus, one namespace, every service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wherry_shared import context
from wherry_shared.api.container import Containers
from wherry_shared.api.content import Content
from wherry_shared.api.diff import Diff
from wherry_shared.api.events import Envelope, Events
from wherry_shared.api.image import Images
from wherry_shared.api.introspection import Introspection
from wherry_shared.api.lease import EXPIRE_LABEL, Lease, Leases
from wherry_shared.api.namespace import Namespaces
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.api.task import Tasks
from wherry_shared.bus import Bus
from wherry_shared.bus import connect as connect_bus
from wherry_shared.bus.credentials import ADMIN, load
from wherry_shared.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Unavailable,
    WherryError,
)
from wherry_shared.runtime import NODE_FILE
from wherry_shared.values import Descriptor, Platform, check_identifier, now

from . import nearby, pulling
from .container import DEFAULT_SNAPSHOTTER, Container, NewContainer
from .image import Image
from .paging import walk as walk
from .progress import OnProgress, silent
from .undo import done, made

if TYPE_CHECKING:
    from .archive.ends import Source, Target
    from .registry import CredentialSource
    from .watch import Listed, Watch

T = TypeVar("T")

DEFAULT_STATE = "/run/wherry"
DEFAULT_NAMESPACE = "default"
DEFAULTS = "containerd.io/defaults/"
LEASE_HOURS = 24
# Which reference a lease is a pull of, and whose.
PULL_LABEL = "wherry/pull"
PULLER_LABEL = "wherry/puller"


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
        self._platform: Platform | None = None

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect. What was started goes on running; what is asked or watched from here on is FailedPrecondition."""
        await self.bus.close()

    # ---- images

    async def pull(
        self,
        reference: str,
        *,
        unpack: bool = False,
        snapshotter: str = "",
        platform: Platform | Sequence[Platform] | None = None,
        all_platforms: bool = False,
        all_metadata: bool = False,
        referrers: bool = False,
        discard_unpacked_layers: bool = False,
        foreign_layers: bool = False,
        insecure: Collection[str] = (),
        hosts_dir: str = "",
        credentials: CredentialSource | None = None,
        on_progress: OnProgress = silent,
    ) -> Image:
        """Fetch an image from a registry into content, record it, and with `unpack` make its snapshots.

        platform: one or several, the node's unless given; the other options are those of `wherry.pull.Options`.
        insecure: hosts (`host:port`) that may be spoken to in plain http; loopback may always. hosts_dir: where
        mirrors and per-host settings are configured (`WHERRY_CONFIG`). credentials: instead of docker's files.
        What is here is not fetched. What an interrupted pull has fetched stays under its lease, for LEASE_HOURS, and
        the next one goes on where it stopped, and lets go of it when it is done.
        NotFound: no such image or platform. DataLoss: the registry sent something else than it announced.
        """
        # The services have their first requests to do while the registry client is loaded and asks for the name.
        labels = {PULL_LABEL: reference, PULLER_LABEL: pulling.begin()}
        ground = asyncio.create_task(self._break_ground(snapshotter, unpack=unpack, labels=labels))
        begun = interrupted = False
        try:
            await asyncio.sleep(0)
            from .pull import Options, Pull
            from .registry import Reference, Registry

            wanted = (platform,) if isinstance(platform, Platform) else tuple(platform or ())
            strict = bool(wanted)
            wanted = wanted or (await self.platform(),)
            options = Options(
                wanted, strict, all_platforms, all_metadata, referrers, unpack, discard_unpacked_layers, foreign_layers
            )
            async with Registry(
                insecure=insecure, foreign_layers=foreign_layers, hosts_dir=hosts_dir, credentials=credentials
            ) as registry:
                pull = Pull(self, Reference.parse(reference), registry, options, on_progress)
                target, data = await pull.resolve()
                lease, chosen = await ground
                begun = True
                with context.use(lease=lease.id):
                    image = await pull.run(target, data, chosen)
            await self._end_given_up(image.name)
            return image
        except (asyncio.CancelledError, Unavailable, DeadlineExceeded):
            interrupted = begun
            raise
        finally:
            pulling.end(labels[PULLER_LABEL])
            if not interrupted:
                await self._leave_ground(ground)

    async def _end_given_up(self, name: str) -> None:
        """End the leases of pulls that were to bring this image, and that nobody goes on with: it is here."""
        from .registry.reference import Reference

        with contextlib.suppress(WherryError):  # they end by themselves, later
            for lease in await walk(self.leases.walk, [f'labels."{PULLER_LABEL}"']):
                wanted = str(Reference.parse(lease.labels.get(PULL_LABEL, "")))
                if wanted == name and pulling.is_given_up(lease.labels[PULLER_LABEL]):
                    await self._end_lease(lease)

    async def push(
        self,
        name: str,
        target: str = "",
        *,
        platform: Platform | Sequence[Platform] | None = None,
        foreign_layers: bool = False,
        referrers: bool = False,
        insecure: Collection[str] = (),
        hosts_dir: str = "",
        credentials: CredentialSource | None = None,
        on_progress: OnProgress = silent,
    ) -> Descriptor:
        """Send an image to a registry, under its own name or as `target`; answers what that name means there now.

        platform: only these, where the image is of several; else all, which have to be here. What the registry has
        is not sent, what a neighbouring repository of the same registry has is mounted, what broke off is resumed.
        The other options are those of `wherry.push.Options`.
        insecure, hosts_dir, credentials: as for `pull`.
        NotFound: no such image, or it is incomplete. Unauthenticated, PermissionDenied: the registry refuses.
        """
        from .push import Options, Push
        from .registry import Reference, Registry

        wanted = () if platform is None else (platform,) if isinstance(platform, Platform) else tuple(platform)
        image = await self.image(name)
        await image.require(wanted)
        options = Options(wanted, foreign_layers, referrers)
        push = Push(self, image, Reference.parse(target or image.name), options, on_progress)
        async with Registry(insecure=insecure, hosts_dir=hosts_dir, credentials=credentials) as registry:
            return await push.run(registry)

    async def _break_ground(self, snapshotter: str, *, unpack: bool, labels: dict[str, str]) -> tuple[Lease, str]:
        """A lease in a namespace that is known, and the snapshotter that is meant."""
        await self.ensure_namespace()
        if snapshotter or not unpack:
            return await self._new_lease(LEASE_HOURS, labels), snapshotter
        lease, chosen = await asyncio.gather(
            self._new_lease(LEASE_HOURS, labels), self.default_snapshotter(), return_exceptions=True
        )
        if isinstance(chosen, BaseException):
            if not isinstance(lease, BaseException):
                await self._end_lease(lease)
            raise chosen
        if isinstance(lease, BaseException):
            raise lease
        return lease, chosen

    async def _leave_ground(self, ground: asyncio.Task[tuple[Lease, str]]) -> None:
        with contextlib.suppress(WherryError):  # whoever waited for it has its error
            lease, _ = await asyncio.shield(ground)
            await self._end_lease(lease)

    async def image(self, name: str) -> Image:
        """An image by its name (`redis`, `docker.io/library/redis:alpine`), or by exactly what it is recorded as.

        NotFound. InvalidArgument: that is no image's name either.
        """
        from .registry.reference import Reference

        try:
            return Image(self, await self.images.get(str(Reference.parse(name))))
        except (InvalidArgument, NotFound):
            with contextlib.suppress(NotFound):
                return Image(self, await self.images.get(name))
            raise

    async def import_images(
        self,
        source: Source,
        *,
        base_name: str = "",
        digests: bool = False,
        index_name: str = "",
        platform: Platform | None = None,
        all_platforms: bool = False,
        labels: Mapping[str, str] | None = None,
        unpack: bool = False,
        snapshotter: str = "",
        on_progress: OnProgress = silent,
    ) -> list[Image]:
        """Record the images of an archive: an OCI image layout or `docker save`'s, plain, gzip or zstd.

        source: a path, a binary file object, an asyncio.StreamReader or an async iterable of bytes; it is read once,
        forwards. The other options are those of `wherry.archive.importing.Wishes`; with `unpack` snapshots are made of
        what runs here. Nothing is recorded unless every image is whole.
        InvalidArgument: it is no such archive, is ambiguous, or its images have no names. NotFound: what is missing.
        DataLoss: it is cut off, or a file is not what its name says. ResourceExhausted: it passes a bound.
        Unimplemented: a checkpoint, or a format that is not known.
        """
        from .archive.importing import Wishes, import_images

        wishes = Wishes(base_name, digests, index_name, platform, all_platforms, labels or {})
        await self.ensure_namespace()
        chosen = (snapshotter or await self.default_snapshotter()) if unpack else ""
        return await import_images(self, source, wishes, unpack_to=chosen, on_progress=on_progress)

    async def export_images(
        self,
        images: Sequence[str | Image],
        target: Target,
        *,
        platforms: Sequence[Platform] = (),
        all_platforms: bool = False,
        docker: bool = True,
        foreign_layers: bool = False,
        on_progress: OnProgress = silent,
    ) -> None:
        """Write images as one archive: an OCI image layout that `docker load` reads, too.

        target: a path, a binary file object or an asyncio.StreamWriter. The other options are those of
        `wherry.archive.exporting.Choice`. The same images give the same bytes.
        NotFound, before the first byte: an image, a platform, or what of it is missing. ResourceExhausted: more names
        than an archive may have. DataLoss: a blob is rotten.
        """
        from .archive.exporting import Choice, export_images

        found = [await self.image(image) if isinstance(image, str) else image for image in images]
        for one in found:
            await one.require(() if all_platforms else platforms)
        wanted = tuple(platforms) if platforms or all_platforms else (await self.platform(),)
        choice = Choice(wanted, all_platforms, docker, foreign_layers)
        await export_images(self, found, target, choice, on_progress)

    async def convert(
        self,
        source: str | Image,
        name: str,
        *,
        compression: str = "",
        level: int = 0,
        oci: bool = False,
        platforms: Sequence[Platform] = (),
        on_progress: OnProgress = silent,
    ) -> Image:
        """Make another image of one, called `name`: the same files in another shape.

        Options are those of `wherry.convert.Wish`. The same input gives the same digest.
        NotFound: the image, a platform, or what of it is missing. DataLoss: a layer is not what its config says.
        """
        from .convert import Wish, convert_image
        from .registry.reference import Reference

        found = await self.image(source) if isinstance(source, str) else source
        await found.require(platforms)
        wish = Wish(compression, level, oci, tuple(platforms))
        return await convert_image(self, found, str(Reference.parse(name).check_target("")), wish, on_progress)

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
        lease = await made(lambda: self._new_lease(hours), self._end_lease)
        try:
            with context.use(lease=lease.id):
                yield lease.id
        finally:
            await done(self._end_lease(lease))

    async def _new_lease(self, hours: float, labels: Mapping[str, str] | None = None) -> Lease:
        expire = (now() + timedelta(hours=hours)).isoformat(timespec="seconds")
        return await self.leases.create(labels={**(labels or {}), EXPIRE_LABEL: expire})

    async def _end_lease(self, lease: Lease) -> None:
        with context.use(lease="", timeout=5.0):
            await self.leases.delete(lease.id)

    @property
    def is_admin(self) -> bool:
        """Whether it may look beyond its namespace; a tenant may not."""
        return self.address.creds.stem == ADMIN

    def within(self, namespace: str) -> Client:
        """This client in another namespace, on the same connection: close either, and both are."""
        return Client(self.bus, namespace, self.address)

    async def ensure_namespace(self) -> None:
        """Make the namespace known before the first thing in it. A tenant's was made by an admin."""
        if self._known_namespace or not self.is_admin:
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
        if not self.is_admin:
            return {}
        namespace = await self.namespaces.get(self.namespace)
        return {k.removeprefix(DEFAULTS): v for k, v in namespace.labels.items() if k.startswith(DEFAULTS)}

    async def platform(self) -> Platform:
        """The node's, whose images are wanted where no other platform is named.

        A tenant may not ask a node that is elsewhere, and takes it to be as this host is.
        """
        if self._platform is None:
            self._platform = await nearby.platform_of(self)
        return self._platform

    def watch(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        token: str = "",
        filters: list[str] | None = None,
        all_namespaces: bool = False,
        follow: bool = True,
    ) -> Watch:
        """Events as they happen; with `since` or a `token` first those of the past, without a hole between the two.

        token: a Watch's own, of any time. until: no event that the stream gets later. follow: False ends it where the
        present begins; without a beginning it begins with the first event that is kept then.
        """
        from .watch import Watch

        return Watch(
            self, since=since, until=until, token=token, filters=filters, all_namespaces=all_namespaces, follow=follow
        )

    def list_and_watch(
        self,
        state: Callable[[], Awaitable[T]],
        *,
        filters: list[str] | None = None,
        all_namespaces: bool = False,
    ) -> AsyncIterator[Listed[T] | Envelope]:
        """What `state` answers, as a Listed, then every event since; a new Listed wherever events were missing."""
        from .watch import list_and_watch

        return list_and_watch(self, state, filters=filters, all_namespaces=all_namespaces)


class _Connecting:
    """What `connect` answers: `await` it for a Client, or enter it with `async with`."""

    def __init__(self, address: Address, namespace: str, direct: bool) -> None:
        self._address = address
        self._namespace = namespace
        self._direct = direct
        self._client: Client | None = None

    async def _connect(self) -> Client:
        own = load(self._address.creds)
        direct = self._address.state if self._direct and own.name == ADMIN else None
        bus = await connect_bus(
            self._address.nats.split(","), node=self._address.node, name=f"{own.name}:{os.getpid()}", seed=own.seed,
            inbox_prefix=own.inbox_prefix, direct=direct, awake=True,
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


def connect(
    *, namespace: str = "", state: str = "", nats: str = "", node: str = "", creds: str = "", direct: bool = True
) -> _Connecting:
    """Connect to a node: `async with wherry.connect(namespace="cpuguy") as client:`.

    state: the node's state directory on this host (`WHERRY_STATE`, /run/wherry), which tells the rest. For a node
    elsewhere give `nats` (URLs, comma-separated), `node` and `creds` (a seed file). direct: False, or
    `WHERRY_DIRECT=0`, when no request shall take the services' own sockets on this host: then all go by NATS.
    Unavailable: no node there. Unauthenticated: the credentials are missing or wrong.
    """
    address = Address.find(state=state, nats=nats, node=node, creds=creds)
    return _Connecting(address, namespace or os.environ.get("WHERRY_NAMESPACE", DEFAULT_NAMESPACE), direct)
