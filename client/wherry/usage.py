"""What images take, and whether they are whole: per image, per platform, per snapshotter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wherry_shared.errors import InvalidArgument, NotFound, WherryError
from wherry_shared.values import Descriptor, Platform

from .graph import Graph, Part, Survey, missing_below, platform_of
from .image import Image, read_document
from .registry import documents
from .registry.platforms import is_attestation
from .together import each
from .unpack import chain_ids

if TYPE_CHECKING:
    from .client import Client

SNAPSHOTTER_PLUGIN = "io.containerd.snapshotter.v1"


@dataclass(frozen=True)
class Usage:
    """What an image takes, in bytes.

    content: all its blobs that are here; unique: those that no other image of the namespace names; manifests: its
    indexes, manifests and configs, a part of `content`. snapshots: those that its platforms' layers are unpacked to,
    shared ones included, by snapshotter.
    """

    content: int
    unique: int
    manifests: int
    snapshots: dict[str, int]


@dataclass(frozen=True)
class PlatformState:
    """One platform's image. `config` is None while it is not here; `unpacked` says it per snapshotter."""

    platform: Platform | None
    manifest: Descriptor
    config: documents.ImageConfig | None
    layers: tuple[Descriptor, ...]
    missing: tuple[Part, ...]
    unpacked: dict[str, bool]

    @property
    def size(self) -> int:
        """The bytes of its layers and its config as its manifest says."""
        return sum(layer.size for layer in self.layers)


@dataclass(frozen=True)
class State:
    """Whether an image is whole. `absent` are the platforms that its index names and of which nothing is here; an
    image is complete when it has a platform here and of that nothing is missing."""

    platforms: tuple[PlatformState, ...]
    absent: tuple[Descriptor, ...]
    missing: tuple[Part, ...]

    @property
    def complete(self) -> bool:
        return bool(self.platforms) and not self.missing

    @property
    def unpacked(self) -> list[str]:
        """The snapshotters in which some platform of it is unpacked."""
        return sorted({name for own in self.platforms for name, there in own.unpacked.items() if there})


async def snapshotters(client: Client) -> list[str]:
    """The node's working snapshotters; the namespace's default alone where the caller may not ask."""
    plugins = await client.introspection.plugins([f"type=={SNAPSHOTTER_PLUGIN}"]) if client.is_admin else []
    found = sorted(plugin.id for plugin in plugins if not plugin.init_error)
    return found or [await client.default_snapshotter()]


class Inspect:
    """Looks at images; what several share is read once."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._survey = Survey(client)
        self._snapshotters: list[str] | None = None
        self._there: dict[tuple[str, str], bool] = {}

    async def state(self, image: Image) -> State:
        """What of an image is here. InvalidArgument, Unimplemented: its documents are none of an image."""
        graph = await self._survey.graph(image.target)
        manifests = [d for d in graph.images if not is_attestation(d)]
        absent = [
            part for part in graph.missing if part.kind in ("manifest", "index", "blob") and _is_child(part, graph)
        ]
        nothing = {part.descriptor.digest for part in absent}
        missing = [part for part in graph.missing if part.descriptor.digest not in nothing]
        states = [await self._platform(graph, manifest) for manifest in manifests]
        return State(tuple(states), tuple(part.descriptor for part in absent), tuple(missing))

    async def _platform(self, graph: Graph, descriptor: Descriptor) -> PlatformState:
        manifest = graph.manifests[descriptor.digest]
        config = None
        if manifest.config.media_type in documents.CONFIG_TYPES:
            try:
                config = documents.parse_config(await read_document(self._client, manifest.config))
            except NotFound:
                config = None
        unpacked = await self._unpacked(config)
        platform = descriptor.platform or (config.platform if config and config.platform.os else None)
        missing = tuple(missing_below(graph, descriptor))
        return PlatformState(platform, descriptor, config, manifest.layers, missing, unpacked)

    async def _unpacked(self, config: documents.ImageConfig | None) -> dict[str, bool]:
        if self._snapshotters is None:
            self._snapshotters = await snapshotters(self._client)
        chain = chain_ids(config.diff_ids) if config else []
        if not chain:
            return dict.fromkeys(self._snapshotters, False)
        return {name: await self._is_there(name, chain[-1]) for name in self._snapshotters}

    async def _is_there(self, snapshotter: str, name: str) -> bool:
        key = (snapshotter, name)
        if key not in self._there:
            try:
                await self._client.snapshots.stat(snapshotter, name)
                self._there[key] = True
            except NotFound:
                self._there[key] = False
        return self._there[key]

    # ---- bytes

    async def usage(self, image: Image, others: Iterable[Image] = ()) -> Usage:
        """What an image takes; `others` are those of which `unique` counts nothing."""
        graph = await self._survey.graph(image.target)
        shared: set[str] = set()
        for other in others:
            if other.name != image.name:
                shared |= set((await self._readable(other)).parts)
        gone = {part.descriptor.digest for part in graph.missing}
        own = [part.descriptor for digest, part in graph.parts.items() if digest not in gone | shared]
        return Usage(
            content=graph.size(),
            unique=sum(descriptor.size for descriptor in own),
            manifests=graph.size("index", "manifest", "config"),
            snapshots=await self._snapshot_sizes(graph),
        )

    async def _readable(self, image: Image) -> Graph:
        """An image's graph as far as it can be read: a broken neighbour is no reason to know nothing."""
        try:
            return await self._survey.graph(image.target, check=False)
        except WherryError:
            return Graph(image.target)

    async def _snapshot_sizes(self, graph: Graph) -> dict[str, int]:
        chains: set[str] = set()
        for descriptor in graph.images:
            config = (await self._platform(graph, descriptor)).config
            chains |= set(chain_ids(config.diff_ids)) if config else set()
        sizes = {}
        for name in self._snapshotters or []:
            found = await each(lambda key, name=name: self._snapshot_size(name, key), sorted(chains))  # type: ignore[misc]
            if any(size is not None for size in found):
                sizes[name] = sum(size or 0 for size in found)
        return sizes

    async def _snapshot_size(self, snapshotter: str, key: str) -> int | None:
        try:
            return (await self._client.snapshots.usage(snapshotter, key)).size
        except NotFound:
            return None

    async def summary(self, image: Image) -> Summary:
        """An image in a list: sizes as its documents say them, so that nothing but documents is read."""
        graph = await self._readable(image)
        platforms = []
        for descriptor in graph.images:
            if not is_attestation(descriptor):
                try:
                    platforms.append(await platform_of(self._client, graph, descriptor))
                except (NotFound, InvalidArgument):
                    platforms.append(None)
        return Summary(image, graph.size(), tuple(p for p in platforms if p is not None))


@dataclass(frozen=True)
class Summary:
    """An image in a list. size: bytes of its blobs as its documents say; platforms: those that are here."""

    image: Image
    size: int
    platforms: tuple[Platform, ...] = field(default_factory=tuple)


def _is_child(part: Part, graph: Graph) -> bool:
    """Whether an index names it: a platform that was never fetched, and not a hole in one that was."""
    children = {child.digest for listed in graph.children.values() for child in listed}
    return part.descriptor.digest in children


async def summaries(client: Client, images: Sequence[Image]) -> list[Summary]:
    """The summaries of many images, side by side."""
    inspect = Inspect(client)
    return await each(inspect.summary, images)
