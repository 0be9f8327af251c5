"""What an image's target reaches in content: indexes, manifests, configs, layers; what of it is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from wherry_shared.values import Descriptor, Platform

from .image import NESTING_MAX, read_document
from .registry import documents, labels, platforms
from .together import each

if TYPE_CHECKING:
    from .client import Client

Kind = Literal["index", "manifest", "config", "layer", "blob"]

PARTS_MAX = 20_000
"""The most blobs of one image, all platforms together."""
DOCUMENTS_MAX = 64 << 20
"""The most bytes of all its indexes and manifests together."""


@dataclass(frozen=True, slots=True)
class Part:
    """One blob of an image, as the document above it names it."""

    descriptor: Descriptor
    kind: Kind


class Select(Protocol):
    """Chooses among an index's children: those that belong to the image in hand, and who chooses below each."""

    def __call__(self, index: documents.Index) -> Sequence[tuple[Descriptor, Select]]: ...


def every(index: documents.Index) -> Sequence[tuple[Descriptor, Select]]:
    """All platforms, and what build tools put beside them."""
    return [(child, every) for child in index.manifests]


def only(wanted: Iterable[Platform]) -> Select:
    """The best child for each platform, and in a nested index for those that led there. NotFound when there is none."""
    chosen = list(wanted)

    def select(index: documents.Index) -> Sequence[tuple[Descriptor, Select]]:
        below = {child.digest: only(own) for child, own in platforms.choose(index.manifests, chosen)}
        return [(child, below[child.digest]) for child in index.manifests if child.digest in below]

    return select


@dataclass(slots=True)
class Graph:
    """An image: its parts by digest, each document before what it names.

    `children` holds of an index what was selected, in the index's order. `missing` is what is not in content, and
    what lies below a missing document nobody knows. A foreign layer that is not in content is no part, nor missing:
    its place is elsewhere.
    """

    target: Descriptor
    parts: dict[str, Part] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)
    indexes: dict[str, documents.Index] = field(default_factory=dict)
    manifests: dict[str, documents.Manifest] = field(default_factory=dict)
    children: dict[str, tuple[Descriptor, ...]] = field(default_factory=dict)
    missing: list[Part] = field(default_factory=list)

    @property
    def images(self) -> list[Descriptor]:
        """The descriptors of its manifests, the best for this host first where there are several."""
        found = [p.descriptor for p in self.parts.values() if p.descriptor.digest in self.manifests]
        return sorted(found, key=_preference)

    def size(self, *kinds: Kind) -> int:
        """The bytes of its parts (of these kinds), as announced; missing ones are not counted."""
        absent = {part.descriptor.digest for part in self.missing}
        wanted = [p for d, p in self.parts.items() if d not in absent and (not kinds or p.kind in kinds)]
        return sum(part.descriptor.size for part in wanted)

    def leave_out_foreign(self) -> None:
        """Take out the layers that are not handed on (OCI image specification, "Non-Distributable Layers")."""
        self.parts = {d: part for d, part in self.parts.items() if not documents.is_foreign(part.descriptor.media_type)}

    def require(self, what: str) -> Graph:
        """Itself when nothing is missing; NotFound that names what is otherwise."""
        if self.missing:
            names = [f"{part.kind} {part.descriptor.digest}" for part in self.missing]
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise NotFound(f"{what} is incomplete: {', '.join(names[:8])}{more} not in content")
        return self

    def labels(self, digest: str) -> dict[str, str]:
        """The labels by which a document keeps what it names (containerd's `gc.ref.content` labels)."""
        if manifest := self.manifests.get(digest):
            return manifest_labels(manifest)
        kept = {child.digest for child in self.children.get(digest, ())}
        index = self.indexes.get(digest)
        # Counted over all, so that a child has the same label whoever wrote it.
        every_one = labels.children(index.manifests) if index else {}
        return {label: child for label, child in every_one.items() if child in kept}


def manifest_labels(manifest: documents.Manifest) -> dict[str, str]:
    """The labels by which a manifest keeps its config and its layers."""
    return labels.children([manifest.config, *manifest.layers])


def _preference(child: Descriptor) -> int:
    if child.platform is None or platforms.is_attestation(child):
        return 1 << 20
    place = platforms.rank(child.platform, platforms.default_platform())
    return 1 << 10 if place is None else place


class Survey:
    """Walks images. One survey reads a document once, however many images share it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._raw: dict[str, bytes] = {}
        self._present: dict[str, bool] = {}

    async def graph(self, target: Descriptor, select: Select = every, *, check: bool = True) -> Graph:
        """The graph of a target. check: ask of every blob whether it is in content; documents show it anyway.

        InvalidArgument, Unimplemented: a document is none that images are made of. ResourceExhausted: there are too
        many. FailedPrecondition: a blob has another size than its descriptor says.
        """
        graph = Graph(target)
        await self._visit(graph, target, select, 0)
        if check:
            await self._check(graph)
        return graph

    async def _visit(self, graph: Graph, descriptor: Descriptor, select: Select, depth: int) -> None:
        kind = document_kind(descriptor)
        if not self._add(graph, descriptor, kind) or kind == "blob":
            return
        raw = await self._read(descriptor)
        if raw is None:
            graph.missing.append(graph.parts[descriptor.digest])
            return
        graph.raw[descriptor.digest] = raw
        if sum(map(len, graph.raw.values())) > DOCUMENTS_MAX:
            raise ResourceExhausted(f"{graph.target.digest} has more than {DOCUMENTS_MAX} bytes of manifests")
        if kind == "manifest":
            self._manifest(graph, descriptor, raw)
            return
        if depth >= NESTING_MAX:
            raise InvalidArgument(f"{graph.target.digest}: indexes are nested deeper than {NESTING_MAX}")
        index = documents.parse_index(raw, descriptor.media_type, f"index {descriptor.digest}")
        graph.indexes[descriptor.digest] = index
        chosen = select(index)
        graph.children[descriptor.digest] = tuple(child for child, _ in chosen)
        for child, below in chosen:
            await self._visit(graph, child, below, depth + 1)

    def _manifest(self, graph: Graph, descriptor: Descriptor, raw: bytes) -> None:
        what = f"manifest {descriptor.digest}"
        manifest = documents.parse_manifest(raw, descriptor.media_type, what, foreign=True)
        graph.manifests[descriptor.digest] = manifest
        self._add(graph, manifest.config, "config")
        for layer in manifest.layers:
            self._add(graph, layer, "layer")

    def _add(self, graph: Graph, descriptor: Descriptor, kind: Kind) -> bool:
        """Take a part in; False when it is there already."""
        known = graph.parts.get(descriptor.digest)
        if known is not None:
            if known.descriptor.size != descriptor.size:
                raise InvalidArgument(f"{descriptor.digest} is said to have two sizes")
            return False
        if len(graph.parts) >= PARTS_MAX:
            raise ResourceExhausted(f"{graph.target.digest} has more than {PARTS_MAX} blobs")
        graph.parts[descriptor.digest] = Part(descriptor, kind)
        return True

    async def _read(self, descriptor: Descriptor) -> bytes | None:
        if descriptor.digest not in self._raw:
            try:
                self._raw[descriptor.digest] = await read_document(self._client, descriptor)
            except NotFound:
                return None
        raw = self._raw[descriptor.digest]
        _same_size(descriptor, len(raw))
        return raw

    async def _check(self, graph: Graph) -> None:
        """Ask for all parts that were not read."""
        asked = [part for digest, part in graph.parts.items() if digest not in graph.raw]
        asked = [part for part in asked if part not in graph.missing]
        found = await each(self._is_present, [part.descriptor for part in asked])
        for part, present in zip(asked, found, strict=True):
            if present:
                continue
            if documents.is_foreign(part.descriptor.media_type):
                del graph.parts[part.descriptor.digest]
            else:
                graph.missing.append(part)

    async def _is_present(self, descriptor: Descriptor) -> bool:
        if descriptor.digest not in self._present:
            try:
                info = await self._client.content.info(descriptor.digest)
            except NotFound:
                self._present[descriptor.digest] = False
            else:
                _same_size(descriptor, info.size)
                self._present[descriptor.digest] = True
        return self._present[descriptor.digest]


def document_kind(descriptor: Descriptor) -> Kind:
    """What a target or an index's child is, by its media type."""
    if descriptor.media_type in documents.INDEX_TYPES:
        return "index"
    return "manifest" if descriptor.media_type in documents.MANIFEST_TYPES else "blob"


def _same_size(descriptor: Descriptor, size: int) -> None:
    if descriptor.size != size:
        raise FailedPrecondition(f"{descriptor.digest} has {size} bytes, and its descriptor says {descriptor.size}")


async def platform_of(client: Client, graph: Graph, child: Descriptor) -> Platform | None:
    """The platform of one of the graph's manifests: as its index says, else its config; None when nobody does."""
    if child.platform is not None:
        return child.platform
    manifest = graph.manifests[child.digest]
    if manifest.config.media_type not in documents.CONFIG_TYPES:
        return None
    config = documents.parse_config(await read_document(client, manifest.config))
    return config.platform if config.platform.os else None


def missing_below(graph: Graph, manifest: Descriptor) -> list[Part]:
    """What of one manifest is missing, itself included."""
    own = graph.manifests.get(manifest.digest)
    digests = {manifest.digest}
    if own is not None:
        digests |= {own.config.digest, *(layer.digest for layer in own.layers)}
    return [part for part in graph.missing if part.descriptor.digest in digests]


async def keep(client: Client, graph: Graph, more: Mapping[str, str] | None = None) -> None:
    """Label the graph's documents, so that the collector keeps what they name; labels that are there stay."""

    # From the bottom up: whoever sees a labelled document finds all below it kept.
    for digest in reversed(list(graph.raw)):
        own = {**graph.labels(digest), **(more or {})}
        if own:
            await client.content.update(digest, own, [f"labels.{key}" for key in own])
