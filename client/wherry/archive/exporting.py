"""Export: images as one tar that is an OCI image layout and what `docker load` reads, the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wherry_shared.api.lease import Resource
from wherry_shared.errors import InvalidArgument, ResourceExhausted
from wherry_shared.streams import read_blob
from wherry_shared.values import Descriptor, Platform

from ..graph import Graph, Select, Survey, every, only
from ..image import Image
from ..progress import OnProgress, Progress, silent
from ..registry import documents
from ..registry.platforms import is_attestation
from . import docker, tar
from .ends import Target, Write, writing
from .intake import INDEX_FILE, LAYOUT_FILE
from .names import annotations_of, familiar

if TYPE_CHECKING:
    from ..client import Client

_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


@dataclass(frozen=True)
class Choice:
    """What of the images is exported.

    platforms, all_platforms: of an index the best image for each platform, or everything that it names. docker: add
    `manifest.json`, for `docker load`, of the images whose layers are all in the archive. foreign_layers: those that
    are here, too, although they are not to be handed on.
    """

    platforms: Sequence[Platform] = field(default_factory=tuple)
    all_platforms: bool = False
    docker: bool = True
    foreign_layers: bool = False

    def select(self) -> Select:
        if self.platforms and self.all_platforms:
            raise InvalidArgument("some platforms and all platforms cannot both be exported")
        return every if self.all_platforms else only(self.platforms)


class Export:
    """One archive of some images."""

    def __init__(self, client: Client, images: Sequence[Image], choice: Choice, on_progress: OnProgress) -> None:
        if not images:
            raise InvalidArgument("an archive of no images cannot be made: name one")
        if len(images) > documents.CHILDREN_MAX:
            raise ResourceExhausted(
                f"{len(images)} names are too many for one archive: {documents.CHILDREN_MAX} can be read again"
            )
        self._client = client
        self._images = images
        self._choice = choice
        self._on_progress = on_progress

    async def run(self, target: Target) -> None:
        """Write it. NotFound, before the first byte: something is missing, and what."""
        survey, select = Survey(self._client), self._choice.select()
        graphs = {}
        for image in self._images:
            if image.target.digest not in graphs:
                graph = await survey.graph(image.target, select)
                graphs[image.target.digest] = graph.require(f"image {image.name}")
                if not self._choice.foreign_layers:
                    graph.leave_out_foreign()
        async with writing(target) as write:
            await self._documents(write, graphs)
            await self._blobs(write, graphs.values())
            await write(tar.END)

    async def _documents(self, write: Write, graphs: dict[str, Graph]) -> None:
        """First what says what the rest is: a reader that only has a stream may refuse at once."""
        await _file(write, LAYOUT_FILE, _LAYOUT)
        await _file(write, INDEX_FILE, self._index())
        saved = self._saved(graphs)
        if self._choice.docker and saved:
            await _file(write, docker.MANIFEST_FILE, docker.manifest_file(saved))

    async def _blobs(self, write: Write, graphs: Any) -> None:
        parts = {digest: part for graph in graphs for digest, part in graph.parts.items()}
        for directory in ["blobs/", *sorted({f"blobs/{digest.partition(':')[0]}/" for digest in parts})]:
            await write(tar.header(directory, directory=True))
        for digest in sorted(parts):
            descriptor = parts[digest].descriptor
            await write(tar.header(_name(digest), descriptor.size))
            async for chunk in read_blob(self._client.content, digest, verify=True):
                await write(chunk)
            await write(tar.padding(descriptor.size))
            self._on_progress(Progress(digest, "stored", parts[digest].kind, descriptor.size, descriptor.size))

    def _index(self) -> bytes:
        """`index.json`: one entry a name, in the order of the names."""
        entries = []
        for image in sorted(self._images, key=lambda image: image.name):
            entry: dict[str, Any] = {
                "mediaType": image.target.media_type, "digest": image.target.digest, "size": image.target.size
            }  # fmt: skip
            entries.append({**entry, "annotations": annotations_of(image.name)})
        made = {"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": entries}
        return json.dumps(made, separators=(",", ":"), ensure_ascii=False).encode()

    def _saved(self, graphs: dict[str, Graph]) -> list[docker.Saved]:
        """docker's view: one image a manifest. A tag can only mean one: this host's, or the first."""
        tags: dict[str, list[str]] = {}
        manifests: dict[str, documents.Manifest] = {}
        for image in sorted(self._images, key=lambda image: image.name):
            graph = graphs[image.target.digest]
            own = [child for child in graph.images if _loadable(child, graph)]
            for child in own:
                manifests[child.digest] = graph.manifests[child.digest]
                tags.setdefault(child.digest, [])
            if own and (name := familiar(image.name)):
                tags[own[0].digest].append(name)
        return [
            docker.Saved(_name(own.config.digest), tags[digest], [_name(layer.digest) for layer in own.layers])
            for digest, own in manifests.items()
        ]


def _loadable(child: Descriptor, graph: Graph) -> bool:
    manifest = graph.manifests[child.digest]
    whole = all(layer.digest in graph.parts for layer in manifest.layers)
    return whole and manifest.config.media_type in documents.CONFIG_TYPES and not is_attestation(child)


def _name(digest: str) -> str:
    algorithm, _, encoded = digest.partition(":")
    return f"blobs/{algorithm}/{encoded}"


async def _file(write: Write, name: str, data: bytes) -> None:
    await write(tar.header(name, len(data)) + data + tar.padding(len(data)))


async def export_images(
    client: Client, images: Sequence[Image], target: Target, choice: Choice, on_progress: OnProgress = silent
) -> None:
    """Export under a lease, so that nothing is collected meanwhile."""
    async with client.lease() as lease:
        for digest in {image.target.digest for image in images}:
            await client.leases.add_resource(lease, Resource(type="content", id=digest))
        await Export(client, images, choice, on_progress).run(target)
