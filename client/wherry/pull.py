"""Pulling is the client's own work: resolve, fetch side by side into content, record, and unpack meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wherry_shared.api.content import CHUNK, Info
from wherry_shared.api.image import Image as Record
from wherry_shared.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from wherry_shared.streams import BlobWriter
from wherry_shared.values import Descriptor, Platform

from .image import NESTING_MAX, Image, Resolved, read_document
from .progress import OnProgress, Progress
from .registry import Registry, documents, labels, platforms
from .registry.reference import Reference
from .unpack import Unpack, chain_ids

if TYPE_CHECKING:
    from .client import Client

PARALLEL = 6
"""Blobs that are fetched at once."""
NODES_MAX = 1000
"""Manifests and indexes of one pull, referrers included."""
# A callback for every so many bytes is enough for a progress bar.
PROGRESS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What of an image is pulled, and what is kept of it.

    platforms: those wanted, () for this host's; all_platforms: every one that there is. all_metadata: the manifests
    and configs of the other platforms, too. referrers: what refers to the image (signatures, SBOMs), too.
    unpack_to: a snapshotter, "" for none; wanted platforms are unpacked, of all only this host's.
    discard_unpacked_layers: layers are not kept once they are unpacked. foreign_layers: from the URLs that manifests
    name.
    """

    platforms: tuple[Platform, ...] = ()
    all_platforms: bool = False
    all_metadata: bool = False
    referrers: bool = False
    unpack_to: str = ""
    discard_unpacked_layers: bool = False
    foreign_layers: bool = False


class Pull:
    """One pull of one image."""

    def __init__(self, client: Client, reference: Reference, registry: Registry, options: Options, on_progress: OnProgress) -> None:
        if options.discard_unpacked_layers and not options.unpack_to:
            raise InvalidArgument("layers that are not unpacked are not discarded: ask for both, or for neither")
        self._client = client
        self._reference = reference
        self._registry = registry
        self._options = options
        self._report = on_progress
        self._slots = asyncio.Semaphore(PARALLEL)
        self._source = labels.source_label(reference.registry)
        self._nodes = 0
        self._ready: dict[str, asyncio.Future[None]] = {}

    async def resolve(self) -> tuple[Descriptor, bytes]:
        """What the name means now. It needs no lease, and may run beside what makes one."""
        self._report(Progress(str(self._reference), "resolving"))
        return await self._registry.resolve(self._reference)

    async def run(self, target: Descriptor, data: bytes) -> Image:
        """Fetch all that the options ask for, unpack, and record the image. The record comes last."""
        name = str(self._reference)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._node(target, data, Want(layers=True, unpack=True), NESTING_MAX))
        image = await self._record(name, target)
        self._report(Progress(name, "done", "image"))
        return image

    # ---- the tree

    async def _node(self, descriptor: Descriptor, data: bytes, want: Want, depth: int) -> None:
        """An index or a manifest that is at hand, and all below it."""
        self._nodes += 1
        if depth <= 0 or self._nodes > NODES_MAX:
            raise ResourceExhausted(
                f"image {self._reference}: over {NESTING_MAX} levels of indexes, or over {NODES_MAX} manifests"
            )
        async with asyncio.TaskGroup() as group:
            if descriptor.media_type in documents.INDEX_TYPES:
                index = documents.parse_index(data, descriptor.media_type)
                kept = labels.children(index.manifests)
                children = self._choose(index, want)
                for child, wanted in children:
                    group.create_task(self._child(child, wanted, depth - 1))
            else:
                foreign = self._options.foreign_layers or not want.unpack
                manifest = documents.parse_manifest(data, descriptor.media_type, foreign=foreign)
                discard = self._options.discard_unpacked_layers
                kept = labels.children((manifest.config, *manifest.layers), layers=not discard)
                group.create_task(self._image(descriptor, manifest, want))
            if self._options.referrers and not want.referrer:
                kept |= await self._referrers(descriptor, group, depth)
            await self._document(descriptor, data, kept)

    def _choose(self, index: documents.Index, want: Want) -> list[tuple[Descriptor, Want]]:
        """The children to fetch, and what of each."""
        options = self._options
        if want.referrer:
            return [(child, want) for child in index.manifests]
        if options.all_platforms:
            host = platforms.choose(index.manifests, (), missing_ok=True)
            return [(child, Want(layers=True, unpack=child in host and want.unpack)) for child in index.manifests]
        wanted = platforms.choose(index.manifests, options.platforms)
        found = [(child, want) for child in wanted]
        if options.all_metadata:
            found += [(child, Want()) for child in index.manifests if child not in wanted]
        return found

    async def _child(self, descriptor: Descriptor, want: Want, depth: int) -> None:
        if descriptor.media_type not in documents.INDEX_TYPES | documents.MANIFEST_TYPES:
            if want.layers:
                await self._blob(descriptor, "blob", await self._info(descriptor.digest))
            return
        async with self._slots:
            data = await self._registry.manifest(self._reference, descriptor)
        await self._node(descriptor, data, want, depth)

    async def _image(self, descriptor: Descriptor, manifest: documents.Manifest, want: Want) -> None:
        """A manifest's config and layers, and its snapshots."""
        unpack = self._options.unpack_to if want.unpack else ""
        layers = self._layers(manifest, want, unpack)
        infos = await self._infos([manifest.config, *layers])
        config = asyncio.create_task(self._blob(manifest.config, "config", infos[manifest.config.digest]))
        if unpack and self._options.discard_unpacked_layers and await self._unpacked(manifest, await config):
            layers = []
        loop = asyncio.get_running_loop()
        ready = {layer.digest: loop.create_future() for layer in layers}
        async with asyncio.TaskGroup() as group:
            for layer in layers:
                group.create_task(self._layer(layer, infos[layer.digest], ready[layer.digest]))
            data = await config
            if unpack:
                resolved = Resolved(descriptor, manifest, documents.parse_config(data or await read_document(self._client, manifest.config)))
                group.create_task(Unpack(self._client, resolved, unpack, ready=ready, on_progress=self._report).run())

    def _layers(self, manifest: documents.Manifest, want: Want, unpack: str) -> list[Descriptor]:
        """The layers to fetch, each once."""
        if not want.layers:
            return []
        skip = not self._options.foreign_layers and not unpack
        layers = {layer.digest: layer for layer in manifest.layers if not (skip and documents.is_foreign(layer.media_type))}
        return list(layers.values())

    # ---- blobs

    async def _layer(self, layer: Descriptor, info: Info | None, ready: asyncio.Future[None]) -> None:
        await self._blob(layer, "layer", info)
        ready.set_result(None)

