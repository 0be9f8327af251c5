"""Import: an archive's blobs into content while it is read, and then its images, once each is known to be whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wherry_shared.api.image import Image as Record
from wherry_shared.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from wherry_shared.streams import write_blob
from wherry_shared.values import Descriptor, Platform, check_labels

from ..compression import decompress, through
from ..graph import Graph, Select, Survey, every, keep, only, platform_of
from ..image import Image, put_record, read_document
from ..progress import OnProgress, Progress, silent
from ..registry import documents
from ..registry.reference import Reference
from ..together import each
from . import docker
from .docker import MANIFEST_FILE
from .ends import Source, chunks
from .intake import INDEX_FILE, LAYOUT_FILE, LEGACY_FILE, Intake
from .names import Namer

if TYPE_CHECKING:
    from ..client import Client

LAYOUT_VERSION = "1.0.0"
# What podman, CRI-O, containerd and checkpointctl mark a checkpoint by. Restoring one obeys what the image says
# (CVE-2026-50195 and its kin): who does not restore must not record it as an image to run either.
_CHECKPOINT_KEYS = (
    "org.criu.checkpoint.", "io.podman.annotations.checkpoint.", "io.kubernetes.cri-o.annotations.checkpoint.",
    "io.containerd.checkpoint.", "containerd.io/checkpoint",
)  # fmt: skip
_CHECKPOINT_TYPES = "application/vnd.containerd.container."


@dataclass(frozen=True)
class Wishes:
    """What an import shall do.

    base_name, digests: see `Namer`. index_name: a name for the whole archive's index. platform, all_platforms: of an
    index only that platform's image, or every one that it names; with neither those that the archive holds, of which
    each must be whole. labels: for the image records.
    """

    base_name: str = ""
    digests: bool = False
    index_name: str = ""
    platform: Platform | None = None
    all_platforms: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)


class Import:
    """One import of one archive. The lease in the context keeps what it stores until it is recorded."""

    def __init__(self, client: Client, wishes: Wishes, on_progress: OnProgress = silent) -> None:
        if wishes.platform is not None and wishes.all_platforms:
            raise InvalidArgument("one platform and all platforms cannot both be imported")
        check_labels(dict(wishes.labels))
        self._client = client
        self._wishes = wishes
        self._on_progress = on_progress
        self._intake = Intake(client, "the archive", on_progress)
        self._survey = Survey(client)
        self._namer = Namer(wishes.base_name, wishes.digests)
        self._index_name = str(Reference.parse(wishes.index_name).check_target("")) if wishes.index_name else ""

    async def run(self, source: Source) -> list[Image]:
        """Read it, check every image, label, record. Nothing is recorded unless everything is whole."""
        stream = chunks(source)
        plain = through(stream, lambda it: decompress(it, "the archive"))
        async with aclosing(stream), aclosing(plain):
            await self._intake.read(plain)
        roots = await self._roots()
        if not roots:
            raise InvalidArgument(f"the archive's images have no names{self._refused()}: give a base name and digests")
        graphs = [await self._graph(target) for target in roots.values()]
        for graph in graphs:
            await keep(self._client, graph)
            await self._still_there(graph)
        images = [await self._record(name, target) for name, target in roots.items()]
        for image in images:
            self._on_progress(Progress(image.name, "done", "image"))
        return images

    def _refused(self) -> str:
        names = self._namer.refused
        return f" below {self._wishes.base_name} (but {', '.join(names[:5])})" if names else ""

    # ---- what the archive says

    async def _roots(self) -> dict[str, Descriptor]:
        """Name -> target of every image to record."""
        told = self._intake.documents
        if LAYOUT_FILE in told and INDEX_FILE in told:
            return await self._layout(told[LAYOUT_FILE], told[INDEX_FILE])
        if MANIFEST_FILE in told:
            return await self._docker(told[MANIFEST_FILE])
        if LEGACY_FILE in told:
            raise Unimplemented("the archive is of a docker before 1.10: it has no manifest.json")
        found = f": {INDEX_FILE} without {LAYOUT_FILE}" if INDEX_FILE in told else ""
        raise InvalidArgument(f"the archive is neither an OCI layout nor from `docker save`{found}")

    async def _layout(self, layout: bytes, raw: bytes) -> dict[str, Descriptor]:
        version = documents.parse_object(layout, LAYOUT_FILE).get("imageLayoutVersion")
        if version != LAYOUT_VERSION:
            raise Unimplemented(f"the archive's layout has the version {str(version)[:40]!r}, not {LAYOUT_VERSION}")
        index = documents.parse_index(raw, documents.OCI_INDEX, INDEX_FILE)
        refuse_checkpoint(index.annotations, INDEX_FILE)
        roots: dict[str, Descriptor] = {}
        for child in index.manifests:
            refuse_checkpoint(child.annotations, INDEX_FILE)
            for name in self._namer.of_annotations(child.annotations, child.digest):
                _add(roots, name, child)
        if self._index_name:
            _add(roots, self._index_name, await self._store(raw, documents.OCI_INDEX))
        return roots

    async def _docker(self, raw: bytes) -> dict[str, Descriptor]:
        roots: dict[str, Descriptor] = {}
        made: list[Descriptor] = []
        for saved in docker.parse_manifest_file(raw):
            target = await self._saved(saved)
            made.append(target)
            for name in self._namer.of_tags(saved.tags, target.digest):
                _add(roots, name, target)
        if self._index_name:
            _add(roots, self._index_name, await self._store(docker.make_index(made), documents.OCI_INDEX))
        return roots

    async def _saved(self, saved: docker.Saved) -> Descriptor:
        """The manifest of one of docker's images, made and stored."""
        stored = self._intake.find(saved.config)
        layers = [self._intake.find(name) for name in saved.layers]
        if stored.size > documents.DOCUMENT_MAX:
            raise ResourceExhausted(f"the config {saved.config[:200]!r} has {stored.size} bytes")
        target = Descriptor(media_type=docker.CONFIG_TYPE, digest=stored.digest, size=stored.size)
        config = documents.parse_config(await read_document(self._client, target), saved.config[:200])
        if len(config.diff_ids) != len(layers):
            raise InvalidArgument(f"{saved.config[:200]!r}: {len(layers)} layers, {len(config.diff_ids)} diff ids")
        for name, layer, diff_id in zip(saved.layers, layers, config.diff_ids, strict=True):
            if layer.kind == "none" and layer.digest != diff_id:
                raise DataLoss(f"the layer {name[:200]!r} is {layer.digest}, and the config says {diff_id}")
        made = await self._store(docker.make_manifest(stored, layers), documents.DOCKER_MANIFEST)
        return made.model_copy(update={"platform": config.platform if config.platform.os else None})

    async def _store(self, raw: bytes, media_type: str) -> Descriptor:
        """Put a document of the archive, or one made of it, into content."""
        made = docker.describe(raw, media_type)
        ref = f"import-document-{made.digest}"
        await write_blob(self._client.content, ref, raw, size=made.size, expected=made.digest)
        return made

    # ---- is it whole

    async def _graph(self, target: Descriptor) -> Graph:
        graph = await self._survey.graph(target, self._select())
        if graph.target.digest not in graph.raw and not graph.missing:
            raise Unimplemented(f"{target.digest} is a {target.media_type[:100]!r}: neither a manifest nor an index")
        graph.require(f"the image {target.digest} of the archive")
        for index in graph.indexes.values():
            refuse_checkpoint(index.annotations, "an index")
            for child in index.manifests:
                refuse_checkpoint(child.annotations, "an index", child.media_type)
        for digest, manifest in graph.manifests.items():
            await self._check_manifest(graph, digest, manifest)
        return graph

    async def _still_there(self, graph: Graph) -> None:
        """What the archive left out was in content when we looked; from the labels on it is kept, so look again."""
        archived = self._intake.digests()
        left_out = [digest for digest in graph.parts if digest not in archived]
        await each(self._client.content.info, left_out)

    async def _check_manifest(self, graph: Graph, digest: str, manifest: documents.Manifest) -> None:
        what = f"manifest {digest}"
        refuse_checkpoint(manifest.annotations, what, manifest.config.media_type)
        for layer in manifest.layers:
            refuse_checkpoint(layer.annotations, what, layer.media_type)
        if manifest.config.media_type not in documents.CONFIG_TYPES:
            return  # an artifact: to be kept, not to be run
        config = documents.parse_config(await read_document(self._client, manifest.config), f"config of {what}")
        refuse_checkpoint(config.labels, what)
        if _is_runnable(manifest) and len(config.diff_ids) != len(manifest.layers):
            raise InvalidArgument(f"{what}: {len(manifest.layers)} layers, {len(config.diff_ids)} diff ids")
        if self._wishes.platform is not None and graph.target.digest == digest:
            await self._check_platform(graph, self._wishes.platform)

    async def _check_platform(self, graph: Graph, wanted: Platform) -> None:
        """An image that is no index must be of the platform that was asked for."""
        own = await platform_of(self._client, graph, graph.target)
        if own is not None:
            only([wanted])(_as_index(graph.target, own))

    def _select(self) -> Select:
        if self._wishes.all_platforms:
            return every
        if self._wishes.platform is not None:
            return only([self._wishes.platform])
        archived = self._intake.digests()

        def held(index: documents.Index) -> Sequence[tuple[Descriptor, Select]]:
            children = [child for child in index.manifests if child.digest in archived] or index.manifests
            return [(child, held) for child in children]

        return held

    async def _record(self, name: str, target: Descriptor) -> Image:
        # Annotations and labels of strangers stay in their documents: a record's labels steer services.
        bare = Descriptor(media_type=target.media_type, digest=target.digest, size=target.size)
        record = Record(name=name, target=bare, labels=dict(self._wishes.labels))
        mask = ["target", *(f"labels.{key}" for key in self._wishes.labels)]
        return await put_record(self._client, record, mask)


def _add(roots: dict[str, Descriptor], name: str, target: Descriptor) -> None:
    known = roots.setdefault(name, target)
    if known.digest != target.digest:
        raise InvalidArgument(f"the archive is ambiguous: {name} names two images")


def _as_index(target: Descriptor, platform: Platform) -> documents.Index:
    return documents.Index("", (target.model_copy(update={"platform": platform}),), {})


def _is_runnable(manifest: documents.Manifest) -> bool:
    return all(".tar" in layer.media_type for layer in manifest.layers)


def refuse_checkpoint(annotations: Mapping[str, str], what: str, media_type: str = "") -> None:
    """Unimplemented for what marks a checkpoint of a container."""
    marked = next((key for key in annotations if key.startswith(_CHECKPOINT_KEYS)), "")
    if marked or media_type.startswith(_CHECKPOINT_TYPES):
        raise Unimplemented(f"{what[:200]} is of a container's checkpoint ({marked or media_type}): no image to run")


async def import_images(
    client: Client, source: Source, wishes: Wishes, *, unpack_to: str = "", on_progress: OnProgress = silent
) -> list[Image]:
    """Import under a lease of its own, and unpack with that snapshotter ("": not)."""
    async with client.lease():
        images = await Import(client, wishes, on_progress).run(source)
        if unpack_to:
            for image in {image.target.digest: image for image in images}.values():
                await _unpack(image, unpack_to, wishes.platform)
        return images


async def _unpack(image: Image, snapshotter: str, platform: Platform | None) -> None:
    try:
        _, manifest = await image.manifest(platform)
    except NotFound:
        if platform is not None:
            raise
        return  # an image for other hosts: nothing to run here
    if manifest.config.media_type in documents.CONFIG_TYPES:  # an artifact is no file system
        await image.unpack(snapshotter, platform)
