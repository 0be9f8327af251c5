"""Pulling is the client's own work: resolve, fetch side by side into content, record, and unpack meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING

from wherry_shared.api.image import Image as Record
from wherry_shared.errors import AlreadyExists, InvalidArgument
from wherry_shared.streams import BlobWriter, write_blob
from wherry_shared.values import Descriptor, Platform

from .image import NESTING_MAX, Image, Resolved, read_document
from .progress import OnProgress, Progress
from .registry import Registry, documents, platforms
from .registry.reference import Reference
from .unpack import Unpack

if TYPE_CHECKING:
    from .client import Client

PARALLEL = 4
REF_LABEL = "containerd.io/gc.ref.content"
SOURCE_LABEL = "containerd.io/distribution.source"
# A callback for every so many bytes is enough for a progress bar.
PROGRESS_BYTES = 1 << 20


class Pull:
    """One pull of one image."""

    def __init__(
        self, client: Client, reference: str, *, platform: Platform | None, insecure: Collection[str],
        on_progress: OnProgress,
    ) -> None:  # fmt: skip
        self._client = client
        self._reference = Reference.parse(reference)
        self._platform = platform
        self._insecure = insecure
        self._on_progress = on_progress
        self._slots = asyncio.Semaphore(PARALLEL)
        self._source = {f"{SOURCE_LABEL}.{self._reference.registry}": self._reference.repository}

    async def run(self, *, unpack_to: str) -> Image:
        """Fetch all, unpack with that snapshotter ("": not), record the image. The record comes last."""
        name = str(self._reference)
        self._on_progress(Progress(name, "resolving"))
        async with Registry(insecure=self._insecure) as registry:
            target, data = await registry.resolve(self._reference)
            manifest_of, manifest = await self._manifest(registry, target, data)
            await self._blob(registry, manifest.config, "config")
            ready = {layer.digest: asyncio.get_running_loop().create_future() for layer in manifest.layers}
            async with asyncio.TaskGroup() as group:
                for layer in {layer.digest: layer for layer in manifest.layers}.values():
                    group.create_task(self._layer(registry, layer, ready[layer.digest]))
                if unpack_to:
                    group.create_task(self._unpack(manifest_of, manifest, unpack_to, ready))
        image = await self._record(name, target)
        self._on_progress(Progress(name, "done", "image"))
        return image

    async def _manifest(
        self, registry: Registry, target: Descriptor, data: bytes
    ) -> tuple[Descriptor, documents.Manifest]:
        """Down through the indexes to this platform's manifest; each document is stored on the way."""
        descriptor = target
        for _ in range(NESTING_MAX):
            if descriptor.media_type not in documents.INDEX_TYPES:
                manifest = documents.parse_manifest(data, descriptor.media_type)
                labels = {f"{REF_LABEL}.config": manifest.config.digest}
                labels |= {f"{REF_LABEL}.l.{i}": layer.digest for i, layer in enumerate(manifest.layers)}
                await self._store(descriptor, data, "manifest", labels)
                return descriptor, manifest
            index = documents.parse_index(data, descriptor.media_type)
            labels = {f"{REF_LABEL}.m.{i}": child.digest for i, child in enumerate(index.manifests)}
            await self._store(descriptor, data, "index", labels)
            descriptor = platforms.pick(index.manifests, self._platform)
            data = await registry.manifest(self._reference, descriptor)
        raise InvalidArgument(f"image {self._reference}: indexes are nested deeper than {NESTING_MAX}")

    async def _store(self, descriptor: Descriptor, data: bytes, kind: str, labels: dict[str, str]) -> None:
        """Put a document that is at hand into content, with the labels that keep what it names."""
        labels = {**labels, **self._source}
        info = await write_blob(
            self._client.content, f"{kind}-{descriptor.digest}", data, size=len(data), expected=descriptor.digest,
            labels=labels,
        )  # fmt: skip
        if not labels.items() <= info.labels.items():
            await self._client.content.update(descriptor.digest, labels, [f"labels.{key}" for key in labels])

    async def _layer(self, registry: Registry, layer: Descriptor, ready: asyncio.Future[None]) -> None:
        async with self._slots:
            await self._blob(registry, layer, "layer")
        ready.set_result(None)

    async def _blob(self, registry: Registry, descriptor: Descriptor, kind: str) -> None:
        """Fetch one blob into content, from where an earlier pull stopped."""
        report = self._on_progress
        try:
            async with BlobWriter(
                self._client.content, f"{kind}-{descriptor.digest}", total=descriptor.size, expected=descriptor.digest
            ) as writer:
                told = writer.offset
                report(Progress(descriptor.digest, "downloading", kind, told, descriptor.size))
                async for chunk in registry.blob(self._reference, descriptor, offset=writer.offset):
                    await writer.write(chunk)
                    if writer.offset - told >= PROGRESS_BYTES:
                        told = writer.offset
                        report(Progress(descriptor.digest, "downloading", kind, told, descriptor.size))
                await writer.commit(labels=self._source)
            report(Progress(descriptor.digest, "downloaded", kind, descriptor.size, descriptor.size))
        except AlreadyExists:
            report(Progress(descriptor.digest, "exists", kind, descriptor.size, descriptor.size))
            await self._client.content.update(
                descriptor.digest, self._source, [f"labels.{key}" for key in self._source]
            )

    async def _unpack(
        self, descriptor: Descriptor, manifest: documents.Manifest, snapshotter: str,
        ready: dict[str, asyncio.Future[None]],
    ) -> None:  # fmt: skip
        config = documents.parse_config(await read_document(self._client, manifest.config))
        resolved = Resolved(descriptor, manifest, config)
        await Unpack(self._client, resolved, snapshotter, ready=ready, on_progress=self._on_progress).run()

    async def _record(self, name: str, target: Descriptor) -> Image:
        bare = Descriptor(media_type=target.media_type, digest=target.digest, size=target.size)
        record = Record(name=name, target=bare)
        try:
            return Image(self._client, await self._client.images.create(record))
        except AlreadyExists:
            return Image(self._client, await self._client.images.update(record, ["target"]))
