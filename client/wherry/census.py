"""Everything in a namespace, and what of it anything keeps: the collector's rules, asked before anything is removed.

It is a preview made of many calls, not a collection: what is added meanwhile it does not know. The collector decides.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wherry_shared import references
from wherry_shared.api.container import Container
from wherry_shared.api.content import Info as Blob
from wherry_shared.api.content import Ingest
from wherry_shared.api.image import Image as Record
from wherry_shared.api.lease import Lease, Resource
from wherry_shared.api.snapshot import Info as Snapshot
from wherry_shared.errors import NotFound
from wherry_shared.references import CONTAINERS, CONTENT, IMAGES, INGESTS, LEASES, SNAPSHOTS, Node, Ref

from .paging import walk
from .together import each

if TYPE_CHECKING:
    from .client import Client


@dataclass
class Census:
    """What there is. Snapshots are by (snapshotter, key)."""

    images: list[Record] = field(default_factory=list)
    containers: list[Container] = field(default_factory=list)
    blobs: dict[str, Blob] = field(default_factory=dict)
    ingests: list[Ingest] = field(default_factory=list)
    leases: list[tuple[Lease, list[Resource]]] = field(default_factory=list)
    snapshots: dict[tuple[str, str], Snapshot] = field(default_factory=dict)

    def garbage(self, images: Collection[str] = (), containers: Collection[str] = ()) -> Garbage:
        """What a collection would remove now, were these images and containers gone."""
        nodes = {(node.type, node.key): node for node in self._nodes(set(images), set(containers))}
        kept = _mark(nodes)
        return Garbage(
            [blob for digest, blob in self.blobs.items() if (CONTENT, digest) not in kept],
            [key for key in self.snapshots if (SNAPSHOTS + key[0], key[1]) not in kept],
        )

    def _nodes(self, images: set[str], containers: set[str]) -> Iterable[Node]:
        for image in self.images:
            expires = references.expires_at(image.labels)
            alive = image.name not in images and (expires is None or expires.timestamp() > time.time())
            yield _node(IMAGES, image.name, image.labels, [(CONTENT, image.target.digest)], root=alive)
        for container in self.containers:
            own = (SNAPSHOTS + container.snapshotter, container.snapshot_key)
            hard = [own] if container.snapshot_key else []
            yield _node(CONTAINERS, container.id, container.labels, hard, root=container.id not in containers)
        for blob in self.blobs.values():
            yield _node(CONTENT, blob.digest, blob.labels)
        for (snapshotter, key), snapshot in self.snapshots.items():
            parent = [(SNAPSHOTS + snapshotter, snapshot.parent)] if snapshot.parent else []
            yield _node(SNAPSHOTS + snapshotter, key, snapshot.labels, parent)
        for ingest in self.ingests:
            expected = [(CONTENT, ingest.expected)] if ingest.expected else []
            yield _node(INGESTS, ingest.ref, {}, expected, root=True)
        for lease, resources in self.leases:
            node = _node(LEASES, lease.id, {}, [(r.type, r.id) for r in resources], root=True)
            node.flat = references.FLAT in lease.labels
            yield node


@dataclass(frozen=True)
class Garbage:
    """What nothing keeps. Snapshots are by (snapshotter, key)."""

    blobs: list[Blob]
    snapshots: list[tuple[str, str]]

    @property
    def size(self) -> int:
        """The blobs' bytes."""
        return sum(blob.size for blob in self.blobs)


def _node(type: str, key: str, labels: dict[str, str], hard: Iterable[Ref] = (), *, root: bool = False) -> Node:
    node = Node(type, "", key, root=root, hard=list(hard))
    node.refer(labels, rootable=type == CONTENT or type.startswith(SNAPSHOTS))
    return node


def _mark(nodes: dict[Ref, Node]) -> set[Ref]:
    """What is reachable. What is only listed by a flat lease is kept without what its labels name."""
    whole: set[Ref] = set()
    flat: set[Ref] = set()
    _spread(nodes, [(ref, False) for ref, node in nodes.items() if node.root], whole, flat)
    held = [(ref, node) for ref, node in nodes.items() if node.back]
    while True:  # a back reference keeps its holder, which may keep the next one
        more = [(ref, False) for ref, node in held if ref not in whole and any(b in whole | flat for b in node.back)]
        if not more:
            return whole | flat
        _spread(nodes, more, whole, flat)


def _spread(nodes: dict[Ref, Node], waiting: list[tuple[Ref, bool]], whole: set[Ref], flat: set[Ref]) -> None:
    while waiting:
        ref, is_flat = waiting.pop()
        seen = flat if is_flat else whole
        if ref in seen or ref not in nodes:
            continue
        seen.add(ref)
        node = nodes[ref]
        waiting += [(target, is_flat or node.flat) for target in node.hard]
        if not is_flat:
            waiting += [(target, False) for target in node.soft]


async def census(client: Client, snapshotters: Iterable[str]) -> Census:
    """Count the client's namespace."""
    made = Census()
    made.images = await walk(client.images.walk)
    made.containers = await walk(client.containers.walk, spec=False)
    made.blobs = {blob.digest: blob for blob in await walk(client.content.walk)}
    made.ingests = await client.content.statuses()
    leases = await walk(client.leases.walk)
    listed = await each(lambda lease: _resources(client, lease.id), leases)
    made.leases = list(zip(leases, listed, strict=True))
    for name in snapshotters:
        found = await walk(client.snapshots.walk, snapshotter=name)
        made.snapshots |= {(name, snapshot.name): snapshot for snapshot in found}
    return made


async def _resources(client: Client, lease: str) -> list[Resource]:
    try:
        return await walk(client.leases.resources, id=lease)
    except NotFound:
        return []


async def snapshot_sizes(client: Client, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """The bytes of snapshots; those that went away meanwhile are left out."""

    async def ask(key: tuple[str, str]) -> tuple[tuple[str, str], int | None]:
        try:
            return key, (await client.snapshots.usage(*key)).size
        except NotFound:
            return key, None

    return {key: size for key, size in await each(ask, keys) if size is not None}
