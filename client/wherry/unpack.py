"""From layers in content to snapshots: each layer as soon as it is there.

Layers are extracted side by side, each into a snapshot without parent, and put onto their parents in order at commit
(the snapshotter's `rebase`). A layer that turns out to need what lies under it is extracted again on its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wherry_shared.api.snapshot import REBASE_LABEL, REF_LABEL
from wherry_shared.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from wherry_shared.values import Descriptor, Mount

from .progress import OnProgress, Progress, silent
from .together import together

if TYPE_CHECKING:
    from .client import Client
    from .image import Resolved

UNCOMPRESSED_LABEL = "containerd.io/uncompressed"
# So many layers are extracted at once: the work is the disk's and one core's each.
PARALLEL = 2
# For the commits of the layers below; each takes some milliseconds.
PATIENCE = 30.0


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The chain id of each layer (OCI image specification, "Layer ChainID"): the snapshots' names."""
    chain: list[str] = []
    for diff_id in diff_ids:
        joined = f"{chain[-1]} {diff_id}" if chain else ""
        chain.append("sha256:" + hashlib.sha256(joined.encode()).hexdigest() if joined else diff_id)
    return chain


class Unpack:
    """Unpacks one image with one snapshotter.

    ready: per layer's digest, when its bytes are in content; layers that are not named are there.
    """

    def __init__(
        self, client: Client, image: Resolved, snapshotter: str, *,
        ready: Mapping[str, asyncio.Future[None]] | None = None, on_progress: OnProgress = silent,
    ) -> None:  # fmt: skip
        if len(image.config.diff_ids) != len(image.manifest.layers):
            raise InvalidArgument(
                f"image {image.descriptor.digest} has {len(image.manifest.layers)} layers"
                f" and {len(image.config.diff_ids)} diff ids"
            )
        self._client = client
        self._image = image
        self._snapshotter = snapshotter
        self._ready = ready or {}
        self._on_progress = on_progress
        self._slots = asyncio.Semaphore(PARALLEL)
        self._chain = chain_ids(image.config.diff_ids)
        self._committed: list[asyncio.Future[None]] = []
        # Its commit and those of all layers below are on their way: the service brings them into their order.
        self._sent: list[asyncio.Future[None]] = []

    async def run(self) -> str:
        """Unpack what is missing; answers the topmost chain id ("" for an image without layers).

        DataLoss: a layer's content is not what the config says. InvalidArgument, ResourceExhausted: it can be none.
        """
        if not self._chain:
            return ""
        first = await self._first_missing()
        loop = asyncio.get_running_loop()
        self._committed = [loop.create_future() for _ in self._chain]
        self._sent = [loop.create_future() for _ in self._chain]
        for done in (*self._committed[:first], *self._sent[:first]):
            done.set_result(None)
        async with together() as group:
            for index in range(first, len(self._chain)):
                group.create_task(self._layer(index, group))
        await self._label_config()
        return self._chain[-1]

    async def _first_missing(self) -> int:
        """How many layers from the base up are there: what is has its parents, so that a few have to be asked for."""
        there, missing = 0, len(self._chain)
        likely = [0, missing - 1]  # all or none, most often
        while there < missing:
            index = likely.pop() if likely else (there + missing) // 2
            if await self._is_there(self._chain[index]):
                there = index + 1
            else:
                missing = index
        return there

    async def _is_there(self, chain_id: str) -> bool:
        try:
            await self._client.snapshots.stat(self._snapshotter, chain_id)
        except NotFound:
            return False
        return True

    async def _layer(self, index: int, group: asyncio.TaskGroup) -> None:
        layer = self._image.manifest.layers[index]
        key = await self._extract_alone(index, layer) if index else ""
        if not key:
            if index:
                await asyncio.shield(self._committed[index - 1])
            key = await self._extract(index, layer, self._chain[index - 1] if index else "")
        if index:
            await asyncio.shield(self._sent[index - 1])
        self._sent[index].set_result(None)
        await self._commit(index, key)
        self._committed[index].set_result(None)
        self._on_progress(Progress(layer.digest, "unpacked", "layer", layer.size, layer.size))
        group.create_task(self._label_layer(index))

    async def _extract_alone(self, index: int, layer: Descriptor) -> str:
        """Extract a layer without its parents; answers the key, "" where that cannot be."""
        try:
            return await self._extract(index, layer)
        except (FailedPrecondition, Unimplemented):
            return ""

    async def _extract(self, index: int, layer: Descriptor, parent: str | None = None) -> str:
        """Extract one layer into a fresh active snapshot, on its parent or (None) for itself; answers its key."""
        chain_id, diff_id = self._chain[index], self._image.config.diff_ids[index]
        key = f"extract-{secrets.token_hex(8)} {chain_id}"
        labels = {REBASE_LABEL: "true"} if parent is None else {}
        mounts = await self._client.snapshots.prepare(self._snapshotter, key, parent or "", labels=labels)
        try:
            ready = self._ready.get(layer.digest)
            if ready is not None:
                await asyncio.shield(ready)
            async with self._slots:
                self._on_progress(Progress(layer.digest, "unpacking", "layer", 0, layer.size))
                applied = await self._apply(layer, mounts, standalone=parent is None)
            if applied.digest != diff_id:
                raise DataLoss(f"layer {layer.digest} unpacks to {applied.digest}, and the config says {diff_id}")
        except BaseException:
            await asyncio.shield(self._discard(key))
            raise
        return key

    async def _apply(self, layer: Descriptor, mounts: list[Mount], *, standalone: bool) -> Descriptor:
        try:
            return await self._client.diff.apply(layer, mounts, standalone=standalone)
        except (DataLoss, InvalidArgument, ResourceExhausted) as e:
            raise type(e)(f"layer {layer.digest}: {e.message}") from None

    async def _discard(self, key: str) -> None:
        with contextlib.suppress(NotFound):
            await self._client.snapshots.remove(self._snapshotter, key)

    async def _commit(self, index: int, key: str) -> None:
        chain_id = self._chain[index]
        parent = self._chain[index - 1] if index else ""
        try:
            await self._client.snapshots.commit(
                self._snapshotter, chain_id, key, parent=parent, labels={REF_LABEL: chain_id}, patience=PATIENCE
            )
        except AlreadyExists:  # somebody else unpacked the same layer meanwhile
            await self._discard(key)

    async def _label_layer(self, index: int) -> None:
        layer, diff_id = self._image.manifest.layers[index], self._image.config.diff_ids[index]
        if diff_id != layer.digest:
            await self._client.content.update(
                layer.digest, {UNCOMPRESSED_LABEL: diff_id}, [f"labels.{UNCOMPRESSED_LABEL}"]
            )

    async def _label_config(self) -> None:
        """The config keeps the topmost snapshot, and that its parents."""
        label = f"containerd.io/gc.ref.snapshot.{self._snapshotter}"
        await self._client.content.update(
            self._image.manifest.config.digest, {label: self._chain[-1]}, [f"labels.{label}"]
        )
