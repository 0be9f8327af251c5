"""An image: a name, and what it points at in content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wherry_shared.api.image import Image as Record
from wherry_shared.errors import AlreadyExists, InvalidArgument, NotFound
from wherry_shared.streams import read_blob
from wherry_shared.values import Descriptor, Platform

from .paging import walk
from .registry import documents, platforms
from .registry.reference import Reference

if TYPE_CHECKING:
    from .client import Client
    from .usage import State, Usage

# An index may hold indexes; nobody nests deeper than this.
NESTING_MAX = 4
_RECORD_TRIES = 10


@dataclass(frozen=True)
class Resolved:
    """One platform's image: its manifest's descriptor, the manifest, and its parsed config."""

    descriptor: Descriptor
    manifest: documents.Manifest
    config: documents.ImageConfig


class Image:
    """An image in the client's namespace. Make one with `client.pull` or `client.image`."""

    def __init__(self, client: Client, record: Record) -> None:
        self.client = client
        self.record = record
        # What a digest names never changes, so it is read once.
        self._resolved: dict[str, Resolved] = {}

    def __repr__(self) -> str:
        return f"<Image {self.name} {self.target.digest}>"

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def target(self) -> Descriptor:
        return self.record.target

    async def resolve(self, platform: Platform | None = None) -> Resolved:
        """The image for a platform (the node's unless given). NotFound when it has none, or not all of it is here."""
        key = platform.model_dump_json() if platform else ""
        if key not in self._resolved:
            self._resolved[key] = await self._resolve(platform)
        return self._resolved[key]

    async def _resolve(self, platform: Platform | None) -> Resolved:
        descriptor, manifest = await self.manifest(platform)
        config = documents.parse_config(await read_document(self.client, manifest.config))
        if descriptor == self.target:
            platforms.require(config.platform, [platform] if platform else [], self.name)
        return Resolved(descriptor, manifest, config)

    async def manifest(self, platform: Platform | None = None) -> tuple[Descriptor, documents.Manifest]:
        """The manifest for a platform, and its descriptor, whatever its config is: of an artifact that is no image's.

        NotFound as for `resolve`.
        """
        descriptor = self.target
        for _ in range(NESTING_MAX):
            data = await read_document(self.client, descriptor)
            if descriptor.media_type not in documents.INDEX_TYPES:
                return descriptor, documents.parse_manifest(data, descriptor.media_type, foreign=True)
            wanted = platform or await self.client.platform()
            descriptor = platforms.pick(documents.parse_index(data, descriptor.media_type).manifests, wanted)
        raise InvalidArgument(f"image {self.name}: indexes are nested deeper than {NESTING_MAX}")

    async def require(self, wanted: Sequence[Platform]) -> None:
        """NotFound where it is no index, which tells by itself, and its one platform is not what was asked for."""
        if wanted and self.target.media_type not in documents.INDEX_TYPES:
            _, manifest = await self.manifest()
            if manifest.config.media_type in documents.CONFIG_TYPES:
                for platform in wanted:
                    await self.resolve(platform)

    async def unpack(self, snapshotter: str = "", platform: Platform | None = None) -> str:
        """Make the image's snapshots where they are missing; answers the chain id of the topmost."""
        from .unpack import Unpack

        resolved = await self.resolve(platform)
        chosen = snapshotter or await self.client.default_snapshotter()
        async with self.client.lease():
            return await Unpack(self.client, resolved, chosen).run()

    async def tag(self, name: str, *, force: bool = False) -> Image:
        """Another name for the same target, with the same labels. AlreadyExists, unless `force` lets it move there."""
        name = str(Reference.parse(name).check_target(self.target.digest))
        record = Record(name=name, target=self.target, labels=self.record.labels)
        if force:
            return await put_record(self.client, record)
        return Image(self.client, await self.client.images.create(record))

    async def usage(self) -> Usage:
        """What it takes: its content, its part in that alone, its documents, its snapshots."""
        from .usage import Inspect

        others = [Image(self.client, record) for record in await walk(self.client.images.walk)]
        return await Inspect(self.client).usage(self, others)

    async def state(self) -> State:
        """Whether it is whole and unpacked, per platform; what of it is missing."""
        from .usage import Inspect

        return await Inspect(self.client).state(self)

    async def delete(self, *, sync: bool = False) -> None:
        """Forget the name; what only it held is collected later, with `sync` before this answers.

        NotFound when it is gone already.
        """
        await self.client.images.delete(self.name, sync=sync)


async def put_record(client: Client, record: Record, mask: Sequence[str] = ()) -> Image:
    """Record an image; of one that has the name already what `mask` names is updated (labels and target unless given).

    It may be removed between the two, and made again.
    """
    for _ in range(_RECORD_TRIES):
        try:
            return Image(client, await client.images.create(record))
        except AlreadyExists:
            pass
        try:
            return Image(client, await client.images.update(record, list(mask)))
        except NotFound as e:
            gone = e
    raise gone


async def read_document(client: Client, descriptor: Descriptor) -> bytes:
    """A small document out of content. InvalidArgument when it is larger than a document may be."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in read_blob(client.content, descriptor.digest):
        size += len(chunk)
        if size > documents.DOCUMENT_MAX:
            raise InvalidArgument(f"{descriptor.digest} is larger than a document of {documents.DOCUMENT_MAX} bytes")
        chunks.append(bytes(chunk))
    return b"".join(chunks)
