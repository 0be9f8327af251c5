"""Pushing is the client's own work: blobs first, side by side, then manifests, then indexes, and the name last."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from wherry_shared.api.content import Info
from wherry_shared.errors import InvalidArgument, NotFound
from wherry_shared.streams import read_blob
from wherry_shared.values import Descriptor, Platform

from .graph import Graph, Part, Survey, every, only
from .image import Image, read_document
from .progress import OnProgress, Progress, Step
from .registry import Registry, documents, labels
from .registry.reference import Reference
from .registry.upload import Blob, Upload
from .together import each, together

if TYPE_CHECKING:
    from .client import Client

PARALLEL = 6
"""Blobs that are sent at once."""
# A callback for every so many bytes is enough for a progress bar.
PROGRESS_BYTES = 1 << 20


@dataclass(slots=True)
class _Plan:
    """The documents to put: manifests side by side, then indexes one after the other, the root under the name."""

    manifests: dict[str, Descriptor] = field(default_factory=dict)
    indexes: dict[str, Descriptor] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Options:
    """What of an image is pushed.

    platforms: only theirs; else all. foreign_layers: those that are here, too, although they are not to be handed on.
    referrers: what refers to it (signatures, SBOMs) as a pull has brought it, too.
    """

    platforms: tuple[Platform, ...] = ()
    foreign_layers: bool = False
    referrers: bool = False


class Push:
    """One push of one image to one name."""

    def __init__(
        self, client: Client, image: Image, target: Reference, options: Options, on_progress: OnProgress
    ) -> None:
        if target.digest and target.digest != image.target.digest:
            raise InvalidArgument(f"{target} names another digest than {image.name}, which is {image.target.digest}")
        self._client = client
        self._image = image
        self._target = target
        self._options = options
        self._report = on_progress
        self._label = labels.source_label(target.registry)
        self._infos: dict[str, Info] = {}

    async def run(self, registry: Registry) -> Descriptor:
        """Send it; answers what the name means at the registry now.

        NotFound names what of it is missing here. With platforms only theirs: one platform's manifest under the
        name, of several an index of them.
        """
        name = str(self._target)
        self._report(Progress(name, "resolving"))
        graph = await self._graph(self._options.platforms)
        plan = _Plan(raw=dict(graph.raw))
        root = _plan(graph, graph.target, plan)
        if self._target.digest and root.digest != self._target.digest:
            raise InvalidArgument(f"{self._target} names a digest, and a part of the image has another one")
        upload = await registry.upload(self._target)
        await self._send(upload, graph, plan, root)
        await upload.manifest(root, plan.raw[root.digest], self._target.tag)
        if self._options.referrers:
            subjects = [digest for digest in (*plan.manifests, *plan.indexes) if digest in graph.raw]
            await each(lambda digest: self._refer(registry, upload, digest), subjects, PARALLEL)
        await self._note([digest for digest in graph.parts if digest in self._infos or digest in graph.raw])
        self._report(Progress(name, "done", "image"))
        return root

    async def _send(self, upload: Upload, graph: Graph, plan: _Plan, root: Descriptor) -> None:
        """All that is below the root."""
        await self._blobs(upload, [part for part in graph.parts.values() if part.descriptor.digest not in graph.raw])
        manifests = [d for d in plan.manifests.values() if d.digest != root.digest]
        await each(lambda d: upload.manifest(d, plan.raw[d.digest]), manifests, PARALLEL)
        for index in plan.indexes.values():
            if index.digest != root.digest:
                await upload.manifest(index, plan.raw[index.digest])

    # ---- what refers to it

    async def _refer(self, registry: Registry, upload: Upload, subject: str) -> None:
        """Send what refers to a document, and list it under its tag where the registry keeps no list by itself.

        (OCI distribution specification, "Pushing Manifests with Subject".)
        """
        known = (await self._client.content.info(subject)).labels
        found = {digest: await self._document(digest) for digest in labels.referring(known)}
        if not found:
            return
        for descriptor, raw in found.values():
            graph = (await Survey(self._client).graph(descriptor)).require(f"what refers to {subject}")
            plan = _Plan(raw=dict(graph.raw))
            await self._send(upload, graph, plan, _plan(graph, descriptor, plan))
            await upload.manifest(descriptor, raw)
        listed = {d.digest for d in await registry.referrers(self._target, subject)}
        unlisted = [documents.describe_referrer(d, raw) for d, raw in found.values() if d.digest not in listed]
        if unlisted:
            await self._list(registry, upload, subject.replace(":", "-"), unlisted)

    async def _document(self, digest: str) -> tuple[Descriptor, bytes]:
        raw = await read_document(self._client, Descriptor(media_type="", digest=digest, size=0))
        return Descriptor(media_type=documents.document_type(raw), digest=digest, size=len(raw)), raw

    async def _list(self, registry: Registry, upload: Upload, tag: str, added: list[dict[str, Any]]) -> None:
        try:
            _, raw = await registry.resolve(replace(self._target, tag=tag, digest=""))
            document = documents.parse_object(raw, f"what refers to {tag}")
        except NotFound:
            document = {"schemaVersion": 2, "mediaType": documents.OCI_INDEX}
        document["manifests"] = [*(document.get("manifests") or []), *added]
        data = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        await upload.manifest(Descriptor(media_type=documents.OCI_INDEX, digest=digest, size=len(data)), data, tag)

    # ---- what

    async def _graph(self, wanted: Sequence[Platform]) -> Graph:
        try:
            select = only(wanted) if wanted else every
            graph = await Survey(self._client).graph(self._image.target, select)
            if not self._options.foreign_layers:
                graph.leave_out_foreign()
            return graph.require(f"image {self._image.name}")
        except NotFound as e:
            hint = "" if wanted else "; pull it for all platforms, or push it for those that are here"
            raise NotFound(f"{e.message}{hint}") from None

    # ---- blobs

    async def _blobs(self, upload: Upload, parts: list[Part]) -> None:
        infos = await each(lambda part: self._client.content.info(part.descriptor.digest), parts)
        self._infos |= {info.digest: info for info in infos}
        slots = asyncio.Semaphore(PARALLEL)

        async def one(part: Part) -> None:
            async with slots:
                await self._blob(upload, part)

        async with together() as group:
            for part in parts:
                group.create_task(one(part))

    async def _blob(self, upload: Upload, part: Part) -> None:
        digest, size = part.descriptor.digest, part.descriptor.size
        told = 0

        def on_sent(offset: int) -> None:
            nonlocal told
            if offset - told >= PROGRESS_BYTES or offset < told:
                told = offset
                self._tell(part, "uploading", offset)

        def read(offset: int) -> AsyncGenerator[bytes, None]:
            return read_blob(self._client.content, digest, offset=offset)

        self._tell(part, "uploading", 0)
        known = self._infos[digest].labels.get(self._label, "")
        sources = tuple(name for name in known.split(",") if name)
        outcome = await upload.blob(Blob(digest, size, read, sources), on_sent)
        self._tell(part, outcome, size)

    def _tell(self, part: Part, step: Step, offset: int) -> None:
        self._report(Progress(part.descriptor.digest, step, part.kind, offset, part.descriptor.size))

    async def _note(self, digests: Sequence[str]) -> None:
        """Write down where the blobs are now: a later push mounts them from there."""

        async def note(digest: str) -> None:
            info = self._infos.get(digest) or await self._client.content.info(digest)
            value = labels.add_source(info.labels.get(self._label, ""), self._target.repository)
            if info.labels.get(self._label) != value:
                await self._client.content.update(digest, {self._label: value}, [f"labels.{self._label}"])

        await each(note, digests)


def _plan(graph: Graph, descriptor: Descriptor, plan: _Plan, *, top: bool = True) -> Descriptor:
    """Plan a document and all below it; answers what is put in its place, where children were left out."""
    digest = descriptor.digest
    if digest not in graph.raw:
        return descriptor  # no document: a blob that an index names
    if digest not in graph.indexes:
        plan.manifests[digest] = descriptor
        return descriptor
    chosen = graph.children[digest]
    puts = {child.digest: _plan(graph, child, plan, top=False) for child in chosen}
    whole = {child.digest for child in graph.indexes[digest].manifests}
    if puts.keys() != whole or any(put.digest != old for old, put in puts.items()):
        if top and len(puts) == 1:
            return next(iter(puts.values()))
        descriptor, data = _cut(descriptor, graph.raw[digest], puts)
        plan.raw[descriptor.digest] = data
    plan.indexes[descriptor.digest] = descriptor
    return descriptor


def _cut(descriptor: Descriptor, raw: bytes, puts: dict[str, Descriptor]) -> tuple[Descriptor, bytes]:
    """The index with some of its children only; everything else of it stays."""
    document = documents.parse_object(raw, f"index {descriptor.digest}")
    document["manifests"] = [
        {**child, "digest": puts[child["digest"]].digest, "size": puts[child["digest"]].size}
        for child in document["manifests"] if child["digest"] in puts
    ]  # fmt: skip
    data = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    return Descriptor(media_type=descriptor.media_type, digest=digest, size=len(data)), data
