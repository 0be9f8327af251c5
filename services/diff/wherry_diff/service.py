"""The edge of the diff service: whose mounts, which blob, and where its bytes come from and go to."""

from __future__ import annotations

import asyncio
import binascii
import os
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from wherry_shared import context
from wherry_shared.api.content import Content
from wherry_shared.api.diff import GZIP_LAYER, UNCOMPRESSED_LABEL, Change, Diff
from wherry_shared.api.snapshot import Info, Snapshots
from wherry_shared.bus.proxy import walk
from wherry_shared.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    WherryError,
)
from wherry_shared.streams import BlobWriter, read_blob
from wherry_shared.values import Descriptor, Labels, Mount, Page

from .apply import Application
from .compare import Compared, Comparison, Redo
from .compress import compressor, is_plain
from .limits import Limits
from .pool import Pool
from .processors import Processor

PLAIN_LAYER = "application/vnd.oci.image.layer.v1.tar"
SNAPSHOTTERS = ("overlay", "native", "btrfs", "erofs")
_ASKED_AT_ONCE = 32
_MOUNTS_MAX = 256
_EPOCH_MAX = 1 << 40
_DROP_SECONDS = 10.0


class DiffService(Diff):
    """Extracts and makes layers in worker processes.

    snapshotters: those whose mounts a tenant may give. processors: stream processors for `apply`.
    """

    def __init__(
        self, content: Content, snapshots: Snapshots, pool: Pool, limits: Limits, spool: Path, *,
        processors: Sequence[Processor] = (), snapshotters: Sequence[str] = SNAPSHOTTERS,
    ) -> None:  # fmt: skip
        self._content = content
        self._snapshots = snapshots
        self._pool = pool
        self._limits = limits
        self._spool = spool
        self._processors = tuple(processors)
        self._snapshotters = tuple(snapshotters)

    async def apply(
        self, descriptor: Descriptor, mounts: list[Mount], standalone: bool = False, payloads: dict[str, bytes] = {},
        sync_fs: bool = False,
    ) -> Descriptor:  # fmt: skip
        await self._check_owner(mounts, ["kind==active"])
        async with self._file(descriptor) as path:
            job = Application(
                path, descriptor.media_type, tuple(mounts), str(self._spool), standalone, sync_fs, self._processors,
                payloads, context.current().deadline, self._limits,
            )  # fmt: skip
            applied = await self._pool.apply(job)
        return Descriptor(media_type=PLAIN_LAYER, digest=applied.diff_id, size=applied.size)

    async def compare(
        self, left: list[Mount], right: list[Mount], media_type: str = GZIP_LAYER, ref: str = "", labels: Labels = {},
        source_date_epoch: int | None = None,
    ) -> Descriptor:  # fmt: skip
        compressor(media_type)  # Unimplemented, before anything is opened
        if source_date_epoch is not None and not 0 <= source_date_epoch < _EPOCH_MAX:
            raise InvalidArgument(f"source_date_epoch {source_date_epoch} is no number of seconds since 1970")
        job = await self._comparison(left, right, media_type, source_date_epoch)
        async with BlobWriter(self._content, ref or f"diff-{secrets.token_hex(16)}", truncate=bool(ref)) as writer:
            try:
                made = await self._make(job, writer)
                kept = dict(labels) if is_plain(media_type) else {**labels, UNCOMPRESSED_LABEL: made.diff_id}
                await self._commit(writer, made, kept)
            except BaseException:
                await asyncio.shield(asyncio.create_task(_drop(writer, keep=bool(ref))))
                raise
        return Descriptor(media_type=media_type, digest=made.digest, size=made.size)

    async def changes(
        self, left: list[Mount], right: list[Mount], after: str = "", limit: int = 1000
    ) -> Page[Change]:  # fmt: skip
        job = await self._comparison(left, right, PLAIN_LAYER, None)
        try:
            start = binascii.unhexlify(after)
        except ValueError:
            raise InvalidArgument(f"after {after[:100]!r} is none of this walk's") from None
        found, rest = await self._pool.changes(job, start, max(1, min(limit, 1000)))
        items = [Change.model_validate({"kind": kind, "path": _shown(path)}) for kind, path in found]
        return Page(items=items, next=rest.hex())

    # ---- making

    async def _comparison(
        self, left: Sequence[Mount], right: Sequence[Mount], media_type: str, epoch: int | None
    ) -> Comparison:
        if not right or max(len(left), len(right)) > _MOUNTS_MAX:
            raise InvalidArgument(f"{len(left)} and {len(right)} mounts: a tree to compare has 1 to {_MOUNTS_MAX}")
        for mounts in (left, right):
            if mounts:
                await self._check_owner(mounts, ["kind==active", "kind==view"])
        deadline = context.current().deadline
        return Comparison(tuple(left), tuple(right), media_type, str(self._spool), epoch, deadline, self._limits)

    async def _make(self, job: Comparison, writer: BlobWriter) -> Compared:
        made = await self._pool.compare(job, writer.write)
        if isinstance(made, Redo):
            await writer.restart()
            made = await self._pool.compare(job, writer.write, whole=True)
        if isinstance(made, Redo) or made.size != writer.offset:
            raise Internal("the comparison did not write what it says that it wrote")
        return made

    async def _commit(self, writer: BlobWriter, made: Compared, labels: dict[str, str]) -> None:
        try:
            await writer.commit(made.size, made.digest, labels)
        except AlreadyExists:
            if labels:
                await self._content.update(made.digest, labels, [f"labels.{key}" for key in labels])

    # ---- whose mounts, which file

    async def _check_owner(self, mounts: Sequence[Mount], filters: list[str]) -> None:
        """Mounts name any directory of the host; a tenant's must be those of a snapshot of its own.

        The newest snapshots are asked first: a client works on what it has just made.
        """
        if context.current().identity.is_admin:
            return
        for snapshotter in self._snapshotters:
            with suppress(InvalidArgument):  # this node has no such snapshotter
                infos: list[Info] = []
                async for page in walk(self._snapshots.walk, snapshotter=snapshotter, filters=filters):
                    infos += page.items
                infos.sort(key=lambda info: info.created_at, reverse=True)
                if await self._have(snapshotter, infos, list(mounts)):
                    return
        raise PermissionDenied("these mounts are those of no fitting snapshot of this namespace")

    async def _have(self, snapshotter: str, infos: Sequence[Info], mounts: list[Mount]) -> bool:
        for at in range(0, len(infos), _ASKED_AT_ONCE):
            asked = (self._mounts(snapshotter, info.name) for info in infos[at : at + _ASKED_AT_ONCE])
            if mounts in await asyncio.gather(*asked):
                return True
        return False

    async def _mounts(self, snapshotter: str, name: str) -> list[Mount] | None:
        with suppress(NotFound, FailedPrecondition):  # removed or committed meanwhile
            return await self._snapshots.mounts(snapshotter, name)
        return None

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


async def _drop(writer: BlobWriter, *, keep: bool) -> None:
    """Let go of an ingest, or remove it: with time of its own, since the request's may be over."""
    context.enter(context.current()._replace(deadline=time.time() + _DROP_SECONDS))
    with suppress(WherryError):
        await (writer.close() if keep else writer.abort())


def _shown(path: bytes) -> str:
    return "/" + path.decode("utf-8", "backslashreplace")
