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

Kind = tuple[str, int, int | None, int | None]
"""Its name, how many there are, the bytes that they take, and how many of those would go; None: not to be told."""


@dataclass(frozen=True)
class Spent:
    """One namespace's part. Blobs of other namespaces with the same digest take their bytes only once on disk."""

    namespace: str
    counted: Census
    sizes: dict[tuple[str, str], int]

    def kinds(self) -> Iterator[Kind]:
        """Of `images` reclaimable is the content that goes with all images that no container uses; of `content` and
        `snapshots` what a collection would remove as it is."""
        used = {container.image for container in self.counted.containers}
        unused = [image.name for image in self.counted.images if image.name not in used]
        garbage, without = self.counted.garbage(), self.counted.garbage(unused)
        blobs = self.counted.blobs.values()
        total = sum(blob.size for blob in blobs)
        freed = without.size + self._size(without.snapshots)
        yield "images", len(self.counted.images), self._named(), freed
        yield "content", len(blobs), total, garbage.size
        yield "snapshots", len(self.sizes), sum(self.sizes.values()), self._size(garbage.snapshots)
        yield "containers", len(self.counted.containers), self._writable(), None
        yield "ingests", len(self.counted.ingests), sum(ingest.offset for ingest in self.counted.ingests), None
        yield "leases", len(self.counted.leases), None, None

    def _size(self, keys: Sequence[tuple[str, str]]) -> int:
        return sum(self.sizes.get(key, 0) for key in keys)

    def _named(self) -> int:
        """The content that images keep: what would be garbage without them, and is none with them."""
        gone = {blob.digest for blob in self.counted.garbage().blobs}
        without = self.counted.garbage([image.name for image in self.counted.images])
        return sum(blob.size for blob in without.blobs if blob.digest not in gone)

    def _writable(self) -> int:
        """Their own snapshots."""
        keys = [(c.snapshotter, c.snapshot_key) for c in self.counted.containers if c.snapshot_key]
        return self._size(keys)


async def spent(client: Client, namespaces: Sequence[str] | None = None) -> list[Spent]:
    """What these namespaces take; all that the node has, unless given."""
    if namespaces is None:
        namespaces = [namespace.name for namespace in await walk(client.namespaces.walk)]
    names = await snapshotters(client)
    found = []
    for namespace in namespaces:
        other = client if namespace == client.namespace else client.within(namespace)
        counted = await census(other, names)
        found.append(Spent(namespace, counted, await snapshot_sizes(other, counted.snapshots)))
    return found
