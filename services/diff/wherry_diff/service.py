"""The edge of the diff service: whose mounts, which blob, and where its bytes come from."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from wherry_shared import context
from wherry_shared.api.content import Content
from wherry_shared.api.diff import Diff
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.errors import InvalidArgument, PermissionDenied
from wherry_shared.streams import read_blob
from wherry_shared.values import Descriptor, Mount

from . import targets
from .limits import Limits
from .pool import Pool

PLAIN_LAYER = "application/vnd.oci.image.layer.v1.tar"
SNAPSHOTTERS = ("overlay", "native")


class DiffService(Diff):
    """Extracts layers in worker processes."""

    def __init__(self, content: Content, snapshots: Snapshots, pool: Pool, limits: Limits, spool: Path) -> None:
        self._content = content
        self._snapshots = snapshots
        self._pool = pool
        self._limits = limits
        self._spool = spool

    async def apply(self, descriptor: Descriptor, mounts: list[Mount], standalone: bool = False) -> Descriptor:
        await self._check_owner(mounts)
        target = targets.of(mounts, standalone=standalone)
        async with self._file(descriptor) as path:
            applied = await self._pool.apply(path, descriptor.media_type, target, self._limits)
        return Descriptor(media_type=PLAIN_LAYER, digest=applied.diff_id, size=applied.size)

    async def _check_owner(self, mounts: Sequence[Mount]) -> None:
        """Mounts name any directory of the host; a tenant's must be those of an active snapshot of its own."""
        if context.current().identity.is_admin:
            return
        for snapshotter in SNAPSHOTTERS:
            try:
                page = await self._snapshots.walk(snapshotter, ["kind==active"])
            except InvalidArgument:
                continue  # this node has no such snapshotter
            for info in page.items:
                if await self._snapshots.mounts(snapshotter, info.name) == list(mounts):
                    return
        raise PermissionDenied("these mounts are no active snapshot of this namespace")

    @asynccontextmanager
    async def _file(self, descriptor: Descriptor) -> AsyncIterator[str]:
        """The blob as a file: content's own where it is on this host, else a copy that came over the bus."""
        located = await self._content.locate(descriptor.digest)
        try:
            info = os.stat(located.path)
        except OSError:
            info = None
        if info is not None and (info.st_dev, info.st_ino) == (located.device, located.inode):
            yield located.path
            return
        with NamedTemporaryFile(dir=self._spool, prefix="layer-") as copy:
            async for chunk in read_blob(self._content, descriptor.digest):
                copy.write(chunk)
            copy.flush()
            yield copy.name
