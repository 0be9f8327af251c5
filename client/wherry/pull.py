"""Pulling is the client's own work: resolve, fetch side by side into content, record, and unpack meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from wherry_shared.api.content import CHUNK, Info
from wherry_shared.api.image import Image as Record
from wherry_shared.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from wherry_shared.streams import BlobWriter, write_blob
from wherry_shared.values import Descriptor, Platform

from .image import NESTING_MAX, Image, Resolved, put_record, read_document
from .progress import OnProgress, Progress
from .registry import Registry, documents, labels, platforms
from .registry.reference import Reference
from .together import each, together
from .unpack import Unpack, chain_ids

if TYPE_CHECKING:
    from .client import Client

PARALLEL = 6
"""Large blobs that are fetched at once."""
SMALL_PARALLEL = 16
"""Blobs of one message that are."""
NODES_MAX = 1000
"""Manifests and indexes of one pull, referrers included."""
PATIENCE = 90.0
"""Seconds that a blob is waited for which another pull holds: the service lets go of a killed one's after 60."""
# A callback for every so many bytes is enough for a progress bar.
PROGRESS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What of an image is pulled, and what is kept of it.

    platforms: those wanted; strict: also of an image of one platform alone; all_platforms: every one that there is.
    all_metadata: the manifests and configs of the
    other platforms, too. referrers: what refers to the image (signatures, SBOMs), too. unpack: the wanted platforms,
    also of all, if they are images and no artifacts. discard_unpacked_layers: layers are not kept once they are
    unpacked. foreign_layers: from the URLs that manifests name.
    """

    platforms: tuple[Platform, ...] = ()
    strict: bool = False
    all_platforms: bool = False
    all_metadata: bool = False
    referrers: bool = False
    unpack: bool = False
    discard_unpacked_layers: bool = False
    foreign_layers: bool = False


@dataclass(frozen=True, slots=True)
class _Want:
    """What of one document: its layers, its snapshots; of an index for which platforms. referrer: it refers to the
    image, and is no part of it."""

    layers: bool = False
    unpack: bool = False
    referrer: bool = False
    platforms: tuple[Platform, ...] = ()


class Pull:
    """One pull of one image. `resolve` needs no lease and may run beside what makes one; `run` wants one."""

    def __init__(
        self, client: Client, reference: Reference, registry: Registry, options: Options, on_progress: OnProgress
    ) -> None:
        if options.discard_unpacked_layers and not options.unpack:
            raise InvalidArgument("layers that are not unpacked are not discarded: ask for both, or for neither")
        self._client = client
        self._content = client.content
        self._reference = reference
        self._registry = registry
        self._options = options
        self._report = on_progress
        self._slots = asyncio.Semaphore(PARALLEL)
        self._small_slots = asyncio.Semaphore(SMALL_PARALLEL)
        self._source = labels.source_label(reference.registry)
        self._nodes = 0
        self._ready: dict[str, asyncio.Future[None]] = {}
        self._configs: dict[str, bytes] = {}
        self._group: asyncio.TaskGroup
        self._snapshotter = self._root = ""

    async def resolve(self) -> tuple[Descriptor, bytes]:
        """What the name means now."""
        self._report(Progress(str(self._reference), "resolving"))
        return await self._registry.resolve(self._reference)

    async def run(self, target: Descriptor, data: bytes, snapshotter: str = "") -> Image:
        """Fetch all that the options ask for, unpack, and record the image. The record comes last."""
        name = str(self._reference)
        self._root = target.digest
        self._snapshotter = snapshotter
        wanted = self._options.platforms or (platforms.default_platform(),)
        want = _Want(layers=True, unpack=self._options.unpack, platforms=wanted)
        async with together() as self._group:
            await self._node(target, data, want, NESTING_MAX)
        image = await self._record(name, target)
        self._report(Progress(name, "done", "image"))
        return image

    # ---- the tree

    async def _node(self, descriptor: Descriptor, data: bytes, want: _Want, depth: int) -> None:
        """An index or a manifest that is at hand; what is below it is under way when this returns."""
        self._nodes += 1
        if depth <= 0 or self._nodes > NODES_MAX:
            raise ResourceExhausted(
                f"image {self._reference} is nested deeper than {NESTING_MAX} or has over {NODES_MAX} manifests"
            )
        if descriptor.media_type in documents.INDEX_TYPES:
            index = documents.parse_index(data, descriptor.media_type)
            kept = labels.children(index.manifests)
            for child, wanted in self._choose(index, want):
                self._group.create_task(self._child(child, wanted, depth - 1))
        else:
            foreign = self._options.foreign_layers or not want.unpack
            manifest = documents.parse_manifest(data, descriptor.media_type, foreign=foreign)
            keep_layers = not self._options.discard_unpacked_layers or not self._snapshotter_for(manifest, want)
            kept = labels.children((manifest.config, *manifest.layers), layers=keep_layers)
            self._group.create_task(self._image(descriptor, manifest, want))
        if self._options.referrers and want.layers and not want.referrer:
            kept |= await self._referrers(descriptor)
        await self._document(descriptor, data, kept)

    def _choose(self, index: documents.Index, want: _Want) -> list[tuple[Descriptor, _Want]]:
        """The children to fetch, and what of each."""
        options = self._options
        if want.referrer:
            return [(child, want) for child in index.manifests]
        ours = want.platforms  # none: it is an index of what is taken along
        chosen = platforms.choose(index.manifests, ours, missing_ok=options.all_platforms) if ours else []
        found = [(child, replace(want, platforms=own)) for child, own in chosen]
        if options.all_platforms or options.all_metadata:
            rest = _Want(layers=options.all_platforms)
            known = {child.digest for child, _ in chosen}
            found += [(child, rest) for child in index.manifests if child.digest not in known]
        return found

    async def _child(self, descriptor: Descriptor, want: _Want, depth: int) -> None:
        if descriptor.media_type in documents.INDEX_TYPES | documents.MANIFEST_TYPES:
            async with self._slots:
                data = await self._registry.manifest(self._reference, descriptor)
            await self._node(descriptor, data, want, depth)
        elif want.layers:
            await self._fetch([descriptor], "blob")

    async def _image(self, descriptor: Descriptor, manifest: documents.Manifest, want: _Want) -> None:
        """A manifest's config and layers, and its snapshots."""
        unpack = self._snapshotter_for(manifest, want)
        layers = [
            layer for layer in manifest.layers
            if want.layers and (unpack or self._options.foreign_layers or not documents.is_foreign(layer.media_type))
        ]  # fmt: skip
        if unpack and self._options.discard_unpacked_layers:
            await self._fetch([manifest.config], "config")
            await self._check_platform(descriptor, manifest)
            if await self._is_unpacked(await self._config(manifest), unpack):
                return
            await self._fetch(layers, "layer")
        else:
            await self._fetch([manifest.config, *layers], "layer", config=manifest.config.digest)
            await self._check_platform(descriptor, manifest)
        if unpack:
            await self._unpack(Resolved(descriptor, manifest, await self._config(manifest)), unpack)

    async def _check_platform(self, descriptor: Descriptor, manifest: documents.Manifest) -> None:
        """An image that is no index is of one platform, which only its config says."""
        strict = self._options.strict and not self._options.all_platforms and descriptor.digest == self._root
        if strict and manifest.config.media_type in documents.CONFIG_TYPES:
            own = (await self._config(manifest)).platform
            platforms.require(own, self._options.platforms, str(self._reference))

    async def _unpack(self, image: Resolved, snapshotter: str) -> None:
        unpack = Unpack(self._client, image, snapshotter, ready=self._ready, on_progress=self._report)
        try:
            await unpack.run()
        except (DataLoss, InvalidArgument):  # what is rotten may also look like an archive that is none
            rotten = [layer for layer in image.manifest.layers if await self._is_rotten(layer)]
            if not rotten:
                raise
            await each(lambda layer: self._stream(layer, "layer"), rotten)
            await unpack.run()

    async def _is_rotten(self, layer: Descriptor) -> bool:
        """Whether its bytes were here before the pull and are not what they were; content puts them aside then."""
        try:
            await self._content.verify(layer.digest)
        except DataLoss:
            return True
        return False

    def _snapshotter_for(self, manifest: documents.Manifest, want: _Want) -> str:
        """Which snapshotter unpacks a manifest's layers; "" for none: an artifact's are no file system."""
        return self._snapshotter if want.unpack and manifest.config.media_type in documents.CONFIG_TYPES else ""

    async def _config(self, manifest: documents.Manifest) -> documents.ImageConfig:
        digest = manifest.config.digest
        await asyncio.shield(self._ready[digest])
        data = self._configs.get(digest) or await read_document(self._client, manifest.config)
        return documents.parse_config(data)

    async def _is_unpacked(self, config: documents.ImageConfig, snapshotter: str) -> bool:
        try:
            await self._client.snapshots.stat(snapshotter, chain_ids(config.diff_ids)[-1])
        except (NotFound, IndexError):
            return False
        return True

    async def _referrers(self, subject: Descriptor) -> dict[str, str]:
        found = await self._registry.referrers(self._reference, subject.digest)
        for descriptor in found:
            self._group.create_task(self._child(descriptor, _Want(layers=True, referrer=True), NESTING_MAX))
        return labels.referrers(found)

    # ---- blobs

    async def _fetch(self, descriptors: Iterable[Descriptor], kind: str, *, config: str = "") -> None:
        """Let blobs come into content, each once; `_ready` tells when."""
        loop = asyncio.get_running_loop()
        fresh = {d.digest: d for d in descriptors if d.digest not in self._ready}
        self._ready |= {digest: loop.create_future() for digest in fresh}
        infos = await asyncio.gather(*(self._info(digest) for digest in fresh))
        for descriptor, info in zip(fresh.values(), infos, strict=True):
            own = "config" if descriptor.digest == config else kind
            self._group.create_task(self._blob(descriptor, own, info))

    async def _info(self, digest: str) -> Info | None:
        try:
            return await self._content.info(digest)
        except NotFound:
            return None

    async def _blob(self, descriptor: Descriptor, kind: str, info: Info | None) -> None:
        """Fetch one blob, unless it is here."""
        size = descriptor.size
        whole = info is None and size <= CHUNK
        async with self._small_slots if whole else self._slots:
            step = await (self._small if whole else self._stream)(descriptor, kind)
        if step == "exists":
            await self._label(descriptor.digest, {}, info)
        self._report(Progress(descriptor.digest, "exists" if step == "exists" else "downloaded", kind, size, size))
        self._ready[descriptor.digest].set_result(None)

    async def _small(self, descriptor: Descriptor, kind: str) -> str:
        """A blob that fits into one message, in one call."""
        self._report(Progress(descriptor.digest, "downloading", kind, 0, descriptor.size))
        data = await self._registry.small(self._reference, descriptor)
        if kind == "config":
            self._configs[descriptor.digest] = data
        try:
            await self._content.put(data, descriptor.digest, {self._source: self._reference.repository})
        except AlreadyExists:
            return "exists"
        return "downloaded"

    async def _stream(self, descriptor: Descriptor, kind: str) -> str:
        """Any blob, from where an earlier pull stopped; one that is here is kept by the lease from now on."""
        digest = descriptor.digest
        for _ in range(2):
            try:
                async with BlobWriter(
                    self._content, f"{kind}-{digest}", total=descriptor.size, expected=digest, patience=PATIENCE
                ) as writer:
                    resumed = writer.offset > 0
                    await self._copy(descriptor, kind, writer)
                    try:
                        await writer.commit(labels={self._source: self._reference.repository})
                        return "downloaded"
                    except FailedPrecondition:
                        await writer.abort()  # wrong bytes are not to be resumed
            except AlreadyExists:
                return "exists"
            if not resumed:
                break
        raise DataLoss(f"{self._reference.registry} sent other bytes than {digest}")

    async def _copy(self, descriptor: Descriptor, kind: str, writer: BlobWriter) -> None:
        told = writer.offset
        self._report(Progress(descriptor.digest, "downloading", kind, told, descriptor.size))
        if told > descriptor.size:
            await writer.restart()
        chunks = self._registry.pieces(self._reference, descriptor, offset=writer.offset)
        async with aclosing(chunks):
            async for chunk in chunks:
                await writer.write(chunk)
                if writer.offset - told >= PROGRESS_BYTES:
                    told = writer.offset
                    self._report(Progress(descriptor.digest, "downloading", kind, told, descriptor.size))

    async def _document(self, descriptor: Descriptor, data: bytes, kept: dict[str, str]) -> None:
        """Put a manifest or index into content, with the labels that keep what it names."""
        digest = descriptor.digest
        added = {**kept, self._source: self._reference.repository}
        try:
            if len(data) <= CHUNK:
                await self._content.put(data, digest, added)
                return
            info = await write_blob(
                self._content, f"manifest-{digest}", data, size=len(data), expected=digest, labels=added
            )
        except AlreadyExists:
            info = await self._content.info(digest)
        await self._label(digest, kept, info)

    async def _label(self, digest: str, kept: dict[str, str], info: Info | None) -> None:
        """Give a blob that was here the labels that it lacks."""
        known = (info or await self._content.info(digest)).labels
        source = labels.add_source(known.get(self._source, ""), self._reference.repository)
        wanted = {**kept, self._source: source}
        if changed := {key: value for key, value in wanted.items() if known.get(key) != value}:
            await self._content.update(digest, changed, [f"labels.{key}" for key in changed])

    async def _record(self, name: str, target: Descriptor) -> Image:
        bare = Descriptor(media_type=target.media_type, digest=target.digest, size=target.size)
        return await put_record(self._client, Record(name=name, target=bare), ["target"])
