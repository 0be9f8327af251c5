"""Convert: an image in another compression, for fewer platforms, or in OCI's types; its files stay what they are.

Every layer that is rewritten is held to its diff id while it is. The same input gives the same digest, and what is as
wished already stays the very blob that it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wherry_shared.api.image import Image as Record
from wherry_shared.api.lease import Resource
from wherry_shared.errors import AlreadyExists, DataLoss, InvalidArgument
from wherry_shared.streams import BlobWriter, read_blob, write_blob
from wherry_shared.values import Descriptor, Platform

from .compression import PIECE, Kind, compressor, decompress, through
from .graph import Graph, Survey, every, only
from .image import Image, put_record, read_document
from .progress import OnProgress, Progress, silent
from .registry import documents, labels
from .registry.platforms import is_attestation
from .together import each
from .unpack import UNCOMPRESSED_LABEL

if TYPE_CHECKING:
    from .client import Client

_OCI_LAYER, _DOCKER_LAYER = "application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"
_OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
_DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
_LAYERS: dict[str, Kind] = {
    _OCI_LAYER: "none", f"{_OCI_LAYER}+gzip": "gzip", f"{_OCI_LAYER}+zstd": "zstd",
    _DOCKER_LAYER: "none", f"{_DOCKER_LAYER}.gzip": "gzip", f"{_DOCKER_LAYER}.zstd": "zstd",
}  # fmt: skip
_TO_OCI = {
    documents.DOCKER_LIST: documents.OCI_INDEX,
    documents.DOCKER_MANIFEST: documents.OCI_MANIFEST,
    _DOCKER_CONFIG: _OCI_CONFIG,
}
# They describe the bytes of a layer as it was (tables of contents of lazy formats).
_STALE = ("containerd.io/snapshot/", "io.github.containers.zstd-chunked.", "io.containers.estargz.")
_SUBJECT = "vnd.docker.reference.digest"


@dataclass(frozen=True)
class Wish:
    """What the new image shall be.

    compression: of every layer, `gzip`, `zstd` or `none`; "" leaves layers as they are. level: the compressor's own,
    0 for the usual. oci: documents and layers of docker's media types get OCI's; zstd does that anyway, since
    docker's types have no name for it. platforms: only the best image for each, () for all.
    """

    compression: Kind | str = ""
    level: int = 0
    oci: bool = False
    platforms: Sequence[Platform] = field(default_factory=tuple)

    def check(self) -> Wish:
        """Itself; InvalidArgument when it asks for what there is not."""
        if self.compression not in ("", "gzip", "zstd", "none"):
            raise InvalidArgument(f"compression {self.compression[:40]!r} is not one: gzip, zstd and none are")
        top = {"gzip": 9, "zstd": 19}.get(self.compression, 0)
        if not 0 <= self.level <= top:
            raise InvalidArgument(
                f"level {self.level} is not within 0..{top} for {self.compression or 'no compression'}"
            )
        return self

    @property
    def to_oci(self) -> bool:
        return self.oci or self.compression == "zstd"


class Convert:
    """One conversion. The lease in the context keeps what it writes until it is recorded."""

    def __init__(self, client: Client, wish: Wish, on_progress: OnProgress = silent) -> None:
        self._client = client
        self._wish = wish.check()
        self._on_progress = on_progress
        self._token = secrets.token_hex(8)
        # Old digest -> new descriptor, of everything that is done.
        self._done: dict[str, Descriptor] = {}

    async def run(self, source: Image, name: str) -> Image:
        """Convert and record under `name`, which may be the source's own."""
        graph = await Survey(self._client).graph(source.target, self._select())
        graph.require(f"image {source.name}")
        await self._layers(graph)
        target = await self._document(graph, source.target)
        record = Record(name=name, target=_bare(target), labels=source.record.labels)
        made = await put_record(self._client, record, ["target"])
        self._on_progress(Progress(name, "done", "image"))
        return made

    def _select(self) -> Any:
        return only(self._wish.platforms) if self._wish.platforms else every

    # ---- layers

    async def _layers(self, graph: Graph) -> None:
        """Rewrite all layers that are not as wished, side by side: compressors work without the interpreter's lock."""
        jobs: dict[str, tuple[Descriptor, str]] = {}
        for manifest in graph.manifests.values():
            if manifest.config.media_type not in documents.CONFIG_TYPES:
                continue
            config = documents.parse_config(await read_document(self._client, manifest.config))
            if len(config.diff_ids) != len(manifest.layers):
                continue  # an attestation: its layers are no filesystems
            for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
                if self._is_to_change(layer):
                    jobs[layer.digest] = (layer, diff_id)
        await each(self._layer, jobs.values(), parallel=os.cpu_count() or 1)

    def _is_to_change(self, layer: Descriptor) -> bool:
        kind = _LAYERS.get(layer.media_type)
        return bool(self._wish.compression) and kind is not None and kind != self._wish.compression

    async def _layer(self, job: tuple[Descriptor, str]) -> None:
        layer, diff_id = job
        self._on_progress(Progress(layer.digest, "converting", "layer", 0, layer.size))
        kind: Any = self._wish.compression
        work = Recompress(layer.digest, diff_id.partition(":")[0], kind, self._wish.level)
        ref = f"convert-{self._token}-{layer.digest}"  # our own: others may convert the same layer
        async with BlobWriter(self._client.content, ref) as writer:
            try:
                bytes_in = read_blob(self._client.content, layer.digest)
                async with aclosing(bytes_in), aclosing(through(bytes_in, work)) as bytes_out:
                    async for piece in bytes_out:
                        await writer.write(piece)
                if work.diff_id != diff_id:
                    raise DataLoss(f"layer {layer.digest} unpacks to {work.diff_id}, and the config says {diff_id}")
            except BaseException:
                await writer.abort()
                raise
            told = {UNCOMPRESSED_LABEL: diff_id} if work.digest != diff_id else {}
            size = writer.offset
            try:
                await writer.commit(expected=work.digest, labels=told)
            except AlreadyExists:
                await self._label(work.digest, told)
        made = Descriptor(media_type=self._layer_type(layer), digest=work.digest, size=size)
        self._done[layer.digest] = made
        self._on_progress(Progress(layer.digest, "converted", "layer", made.size, made.size))

    def _layer_type(self, layer: Descriptor) -> str:
        """The media type of a layer in the new image, whether it was rewritten or not."""
        kind = _LAYERS.get(layer.media_type)
        if kind is None:
            return layer.media_type
        if self._wish.compression:
            kind = self._wish.compression  # type: ignore[assignment]
        if self._wish.to_oci or layer.media_type.startswith(_OCI_LAYER):
            return _OCI_LAYER + ("" if kind == "none" else f"+{kind}")
        return _DOCKER_LAYER + ("" if kind == "none" else f".{kind}")

    async def _label(self, digest: str, told: dict[str, str]) -> None:
        if told:
            await self._client.content.update(digest, told, [f"labels.{key}" for key in told])

    # ---- documents

    async def _document(self, graph: Graph, descriptor: Descriptor) -> Descriptor:
        """Rewrite a document after everything that it names; answers its new descriptor, maybe the old one."""
        if descriptor.digest in self._done:
            return self._done[descriptor.digest]
        if descriptor.digest not in graph.raw:
            return descriptor  # something else that an index names
        document = documents.parse_object(graph.raw[descriptor.digest], descriptor.digest)
        if descriptor.digest in graph.manifests:
            kept = self._manifest(document, graph.manifests[descriptor.digest])
        else:
            kept = await self._index(graph, document, descriptor)
        made = await self._store(document, graph.raw[descriptor.digest], descriptor, kept)
        self._done[descriptor.digest] = made
        return made

    def _manifest(self, document: dict[str, Any], manifest: documents.Manifest) -> dict[str, str]:
        own = [manifest.config, *manifest.layers]
        values = [document["config"], *(document.get("layers") or ())]
        for value, old in zip(values, own, strict=True):
            new = self._done.get(old.digest)
            if new is not None:
                _point(value, new)
            value["mediaType"] = self._type(old)
        self._retype(document)
        return labels.children([_as_descriptor(value) for value in values])

    async def _index(self, graph: Graph, document: dict[str, Any], descriptor: Descriptor) -> dict[str, str]:
        kept = {child.digest for child in graph.children[descriptor.digest]}
        values = [value for value in document.get("manifests") or () if value["digest"] in kept]
        by_digest = {child.digest: child for child in graph.children[descriptor.digest]}
        # What a build tool says of an image names it by digest, so images come first.
        for value in sorted(values, key=lambda value: is_attestation(by_digest[value["digest"]])):
            new = await self._document(graph, by_digest[value["digest"]])
            subject = (value.get("annotations") or {}).get(_SUBJECT)
            if subject in self._done:
                value["annotations"][_SUBJECT] = self._done[subject].digest
            value.update(mediaType=new.media_type, digest=new.digest, size=new.size)
        if values:  # a list that is null stays so
            document["manifests"] = values
        self._retype(document)
        return labels.children([_as_descriptor(value) for value in values])

    def _type(self, old: Descriptor) -> str:
        if old.media_type in _LAYERS:
            new = self._done.get(old.digest)
            return new.media_type if new is not None else self._layer_type(old)
        return _TO_OCI.get(old.media_type, old.media_type) if self._wish.to_oci else old.media_type

    def _retype(self, document: dict[str, Any]) -> None:
        if self._wish.to_oci and document.get("mediaType") in _TO_OCI:
            document["mediaType"] = _TO_OCI[document["mediaType"]]

    async def _store(
        self, document: dict[str, Any], old: bytes, descriptor: Descriptor, kept: dict[str, str]
    ) -> Descriptor:
        """Write a document, if it is another one now. It keeps what it names from the moment that it is there."""
        raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        if document == documents.parse_object(old, descriptor.digest):
            raw = old
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}" if raw is not old else descriptor.digest
        media_type = document.get("mediaType") or descriptor.media_type
        if self._wish.to_oci:
            media_type = _TO_OCI.get(media_type, media_type)
        if raw is not old:
            ref = f"convert-document-{digest}"
            await write_blob(self._client.content, ref, raw, size=len(raw), expected=digest, labels=kept)
        await self._label(digest, kept)
        return descriptor.model_copy(update={"digest": digest, "size": len(raw), "media_type": media_type})


def _point(value: dict[str, Any], new: Descriptor) -> None:
    """Let a descriptor in a document name a new blob; what was said of the old one's bytes goes."""
    value.update(digest=new.digest, size=new.size)
    annotations = value.get("annotations")
    if annotations:
        value["annotations"] = {k: v for k, v in annotations.items() if not k.startswith(_STALE)}
        if not value["annotations"]:
            del value["annotations"]


def _as_descriptor(value: dict[str, Any]) -> Descriptor:
    return Descriptor(media_type=value["mediaType"], digest=value["digest"], size=value["size"])


def _bare(target: Descriptor) -> Descriptor:
    return Descriptor(media_type=target.media_type, digest=target.digest, size=target.size)


class Recompress:
    """A layer's bytes in another compression. `diff_id` and `digest` are known at the end."""

    def __init__(self, what: str, algorithm: str, kind: Kind, level: int) -> None:
        self._what = what
        self._algorithm = algorithm
        self._make: Callable[[], Any] = lambda: compressor(kind, level)
        self.diff_id = self.digest = ""

    def __call__(self, source: Iterator[bytes]) -> Iterator[bytes]:
        machine, plain, packed = self._make(), hashlib.new(self._algorithm), hashlib.sha256()
        waiting: list[bytes] = []
        size = 0
        for piece in decompress(source, f"layer {self._what}"):
            plain.update(piece)
            waiting.append(machine.compress(piece))
            size += len(waiting[-1])
            if size >= PIECE:
                yield _joined(waiting, packed)
                size = 0
        waiting.append(machine.flush())
        yield _joined(waiting, packed)
        self.diff_id = f"{self._algorithm}:{plain.hexdigest()}"
        self.digest = f"sha256:{packed.hexdigest()}"


def _joined(waiting: list[bytes], digest: Any) -> bytes:
    whole = b"".join(waiting)
    waiting.clear()
    digest.update(whole)
    return whole


async def convert_image(
    client: Client, source: Image, name: str, wish: Wish, on_progress: OnProgress = silent
) -> Image:
    """Convert under a lease, so that nothing is collected meanwhile."""
    async with client.lease() as lease:
        await client.leases.add_resource(lease, Resource(type="content", id=source.target.digest))
        return await Convert(client, wish, on_progress).run(source, name)
