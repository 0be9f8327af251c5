"""What each namespace takes of the disk, by kind, and what of it would go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .census import Census, census, snapshot_sizes
from .paging import walk
from .usage import snapshotters

if TYPE_CHECKING:
    from .client import Client


@dataclass(frozen=True)
class Kind:
    """One kind of thing: how many there are, and the bytes that they take (None: none of their own).

    garbage: what a collection would remove as it is; prunable: what would go if all images went that no container
    uses, garbage included. Of images these are the bytes that they keep.
    """

    name: str
    count: int
    size: int | None = None
    garbage: int | None = None
    prunable: int | None = None


@dataclass(frozen=True)
class Spent:
    """One namespace's part. Blobs of other namespaces with the same digest take their bytes only once on disk."""

    namespace: str
    counted: Census
    sizes: dict[tuple[str, str], int]

    def kinds(self) -> Iterator[Kind]:
        """Every kind, images first."""
        used = {container.image for container in self.counted.containers}
        unused = [image.name for image in self.counted.images if image.name not in used]
        garbage, without = self.counted.garbage(), self.counted.garbage(unused)
        blobs = self.counted.blobs.values()
        yield Kind("images", len(self.counted.images), self._kept(), 0, without.size - garbage.size)
        yield Kind("content", len(blobs), sum(blob.size for blob in blobs), garbage.size, without.size)
        yield Kind(
            "snapshots", len(self.sizes), sum(self.sizes.values()), self._size(garbage.snapshots),
            self._size(without.snapshots),
        )  # fmt: skip
        yield Kind("containers", len(self.counted.containers), self._writable())
        yield Kind("ingests", len(self.counted.ingests), sum(ingest.offset for ingest in self.counted.ingests))
        yield Kind("leases", len(self.counted.leases))

    def _size(self, keys: Sequence[tuple[str, str]]) -> int:
        return sum(self.sizes.get(key, 0) for key in keys)

    def _kept(self) -> int:
        """The content that images keep: what would be garbage without them, and is none with them."""
        gone = {blob.digest for blob in self.counted.garbage().blobs}
        without = self.counted.garbage([image.name for image in self.counted.images])
        return sum(blob.size for blob in without.blobs if blob.digest not in gone)

    def _writable(self) -> int:
        """Their own snapshots."""
        keys = [(c.snapshotter, c.snapshot_key) for c in self.counted.containers if c.snapshot_key]
        return self._size(keys)


async def spent(client: Client, namespaces: Sequence[str] | None = None) -> list[Spent]:
    """What these namespaces take; all that the node has, unless given. A tenant has one."""
    if namespaces is None and client.is_admin:
        namespaces = [namespace.name for namespace in await walk(client.namespaces.walk)]
    names = await snapshotters(client)
    found = []
    for namespace in namespaces or [client.namespace]:
        other = client if namespace == client.namespace else client.within(namespace)
        counted = await census(other, names)
        found.append(Spent(namespace, counted, await snapshot_sizes(other, counted.snapshots)))
    return found


def on_disk(found: Sequence[Spent]) -> int:
    """The bytes of all their content, of which each blob is stored once however many namespaces have it."""
    return sum({blob.digest: blob.size for own in found for blob in own.counted.blobs.values()}.values())
