"""The rules of the content store: what may be opened, written, committed, read and removed, and when.

An ingest is held by one writer at a time; a blob is what was verified, made durable and recorded, in this order.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from wherry_shared.api.content import CHUNK, Info, Ingest, Located, Opened
from wherry_shared.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
    WherryError,
)  # fmt: skip
from wherry_shared.portions import Portions
from wherry_shared.values import Page, check_digest

from .backends import Backend, Held, Place, Settling
from .metadata import Metadata
from .sharing import Sharing

log = logging.getLogger("wherry.content")

T = TypeVar("T")
Keep = Callable[[str], Awaitable[None]]

IDLE_SECONDS = 60.0
DEFAULT_ALGORITHM = "sha256"
SIZE_MAX = 1 << 62
# Blobs that are read again at a time, each in one of the backend's threads: in all, and of one namespace.
VERIFIED, VERIFIED_OF_ONE = 8, 2
REAPED = 256  # blobs removed in one transaction: a mutation waits for some of them at most


class Writer:
    """An ingest held here. `lock` puts its requests in a row; `since` is when somebody last cared (monotonic).

    linked: the size of the expected blob while one of another namespace stands for the bytes.
    """

    def __init__(self, held: Held, expected: str, linked: int) -> None:
        self.held = held
        self.expected = expected
        self.linked = linked
        self.lock = asyncio.Lock()
        self.seen = held.activity()
        self.since = time.monotonic()


class Store:
    """Blobs and ingests, by namespace.

    instance: this replica on the bus. idle: seconds after which an ingest that nobody cares for is let go. sharing:
    what may be had from other namespaces; without it nothing.
    """

    def __init__(
        self, metadata: Metadata, backend: Backend, *, instance: str, idle: float = IDLE_SECONDS,
        sharing: Sharing | None = None,
    ) -> None:  # fmt: skip
        self._metadata = metadata
        self._sharing = sharing or Sharing(metadata)
        self._backend = backend
        self._instance = instance
        self._idle = idle
        self._writers: dict[tuple[str, str], Writer] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._verifying = asyncio.Semaphore(VERIFIED)
        self._verified = Portions(VERIFIED_OF_ONE)

    async def start(self) -> None:
        """Take over what is on the disk: what no row knows is removed, what a row misses is told."""
        await self._backend.start()
        await self._backend.sweep(self._metadata.knows_key)
        there, known = set(self._backend.blobs()), self._metadata.digests()
        for digest in there - known:
            await self._metadata.unless_known(digest, lambda d=digest: self._backend.remove(d))  # type: ignore[misc]
        for digest in known - there:
            log.warning("blob %s has a record and no bytes: reads fail until it is uploaded again", digest)
        await self._backend.purge()
        self._watch = asyncio.create_task(self._watch_writers())

    async def stop(self) -> None:
        """Let go of every ingest; their bytes stay."""
        if self._watch is not None:
            self._watch.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for name, writer in list(self._writers.items()):
            await self._release(name, writer)
        await self._backend.close()

    # ---- blobs

    def info(self, namespace: str, digest: str) -> Info:
        return self._metadata.answer(namespace, digest)

    async def update(self, namespace: str, digest: str, labels: dict[str, str], mask: Sequence[str]) -> Info:
        return await self._metadata.update(namespace, digest, labels, mask)

    async def walk(self, namespace: str, filters: Sequence[str], after: str, limit: int) -> Page[Info]:
        return await self._metadata.page(namespace, filters, after, limit)

    async def delete(self, namespace: str, digest: str) -> None:
        """Forget a blob; its bytes go when no namespace knows it."""
        await self._metadata.delete(namespace, digest)
        await self._metadata.unless_known(digest, lambda: self._backend.remove(digest))
        await self._backend.purge()

    async def reap(self) -> None:
        """Remove what the garbage collector took out of the records: blobs that no namespace has, unknown ingests."""
        await self._backend.sweep(self._metadata.knows_key)
        unknown = await self._metadata.unknown(self._backend.blobs)
        for first in range(0, len(unknown), REAPED):
            await self._metadata.remove_unknown(unknown[first : first + REAPED], self._backend.remove)
        await self._backend.purge()

    async def read(self, namespace: str, digest: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end."""
        if offset < 0 or size < 0:
            raise InvalidArgument(f"blob {digest}: offset {offset} and size {size} must not be negative")
        total = self._metadata.get(namespace, digest).size
        if offset > total:
            raise OutOfRange(f"blob {digest}: offset {offset} is past its end, {total}")
        wanted = min(size, CHUNK, total - offset)
        if not wanted:
            return b""
        data = await self._backend.read(digest, offset, wanted)
        if len(data) < wanted:
            raise DataLoss(f"blob {digest} ends at {offset + len(data)}, and should have {total} bytes")
        return data

    async def locate(self, namespace: str, digest: str) -> Located:
        size = self._metadata.get(namespace, digest).size
        located = await self._backend.locate(digest)
        if located is None or located.size != size:
            return Located(path="", size=size, device=0, inode=0)  # a read will say what is wrong
        return located

    async def verify(self, namespace: str, digest: str) -> None:
        """Read all of a blob again; rotten bytes are put aside, so that nobody reads them any more."""
        self._metadata.get(namespace, digest)
        async with self._verified.of(namespace), self._verifying:
            await self._verify(namespace, digest)

    async def _verify(self, namespace: str, digest: str) -> None:
        self._metadata.get(namespace, digest)
        found, identity = await self._backend.compute(digest)
        if found != digest:
            found, identity = await self._backend.compute(digest, fresh=True)
        if found == digest:
            return
        aside = await self._metadata.locked(lambda: self._backend.quarantine(digest, identity))
        log.error("blob %s is rotten: its bytes have the digest %s; put aside as %s", digest, found, aside)
        raise DataLoss(f"blob {digest} is rotten: its bytes have the digest {found}; upload it again")

    async def present(self, namespace: str, digest: str) -> bool:
        """Whether a blob is in the namespace, bytes and all."""
        try:
            size = self._metadata.get(namespace, digest).size
        except NotFound:
            return False
        return await self._backend.size(digest) == size

    # ---- ingests

    async def open(self, namespace: str, ref: str, total: int, expected: str, *, truncate: bool) -> Opened:
        """Open or resume an ingest and hold it for one writer."""
        if expected:
            check_digest(expected)
        if not 0 <= total < SIZE_MAX:
            raise InvalidArgument(f"ingest {ref!r}: total {total} is no size of a blob")
        return await self._finish(self._open(namespace, ref, total, expected, truncate=truncate))

    async def _open(self, namespace: str, ref: str, total: int, expected: str, *, truncate: bool) -> Opened:
        if expected and await self.present(namespace, expected):
            if self._metadata.ingest(namespace, ref) is not None:
                await self._drop(namespace, ref, missing_ok=True)
            raise AlreadyExists(f"blob {expected}: already exists")
        linked = 0 if truncate or not expected else await self._elsewhere(expected, total)
        key = ingest_key(namespace, ref)
        try:
            held = await self._backend.open(key, f"ingest {ref!r}")
        except Unavailable as e:
            await self._metadata.refuse(e)
            raise
        resumed = self._metadata.ingest(namespace, ref) is not None  # only now, locked, nobody else makes it
        try:
            if truncate or linked or not resumed:
                await held.truncate()  # bytes without a row are what a crash left
            place = Place() if linked else held.place
            opened = Opened(
                ref=ref, offset=linked or held.size(), instance=self._instance, path=place.path, device=place.device,
                inode=place.inode, complete=linked > 0,
            )  # fmt: skip
            await self._metadata.open(namespace, key, opened, total, expected, held.check)
        except BaseException as e:
            await held.release(keep=resumed)
            raise _named(e, ref) from None
        self._writers[namespace, ref] = Writer(held, expected, linked)
        return opened

    async def _elsewhere(self, digest: str, total: int) -> int:
        """The size of a blob that another namespace shares, if its bytes are there; else 0."""
        size = await self._sharing.size(digest, total)
        return size if size and await self._backend.size(digest) == size else 0

    async def write(self, namespace: str, ref: str, offset: int, data: bytes) -> int:
        """Append at the end, which `offset` must be; offset 0 starts over. Answers the new end."""
        if len(data) > CHUNK:
            raise InvalidArgument(f"ingest {ref!r}: {len(data)} bytes at once are more than {CHUNK}")
        writer = self._writer(namespace, ref)
        async with writer.lock:
            self._check_current(namespace, ref, writer)
            writer.since = time.monotonic()
            if writer.linked:
                if offset == writer.linked and not data:
                    return offset
                await self._unlink(namespace, ref, writer, offset)
            if offset == 0 and writer.held.size():
                await writer.held.truncate()
            return await writer.held.append(offset, data)

    async def _unlink(self, namespace: str, ref: str, writer: Writer, offset: int) -> None:
        """Give a linked ingest bytes of its own: a copy of its blob's, or none when it starts over."""
        if offset not in (0, writer.linked):
            raise OutOfRange(f"ingest {ref!r} ends at {writer.linked}, and not at {offset}")
        if offset:
            await writer.held.copy(writer.expected)
        await self._metadata.unlink(namespace, ref)
        writer.linked = 0

    async def commit(
        self, namespace: str, ref: str, size: int, expected: str, labels: dict[str, str], keep: Keep
    ) -> Info:
        """Verify an ingest and make it a blob; `keep(digest)` is awaited before anyone can see it."""
        if expected:
            check_digest(expected)
        return await self._finish(self._commit(namespace, ref, size, expected, labels, keep))

    async def _commit(
        self, namespace: str, ref: str, size: int, expected: str, labels: dict[str, str], keep: Keep
    ) -> Info:
        writer = self._writer(namespace, ref)
        async with writer.lock:
            self._check_current(namespace, ref, writer)
            digest, total = await self._verify_ingest(namespace, ref, writer, size, expected)
            await keep(digest)
            try:
                if not writer.linked:
                    await writer.held.seal()
                return await self._turn(namespace, ref, writer, digest, total, labels)
            except ResourceExhausted as e:
                raise _named(e, ref) from None

    async def _verify_ingest(
        self, namespace: str, ref: str, writer: Writer, size: int, expected: str
    ) -> tuple[str, int]:
        """The digest and the size of what was written. FailedPrecondition when it is not what is expected."""
        there = writer.linked or writer.held.size()
        if size and size != there:
            raise FailedPrecondition(f"ingest {ref!r} has {there} bytes, and {size} are expected")
        if writer.linked:
            digest, total = writer.expected, there
        else:
            row = self._metadata.ingest(namespace, ref)
            announced = expected or (row.expected if row else "")
            digest, total = await writer.held.digest(announced.partition(":")[0] or DEFAULT_ALGORITHM)
        if size and size != total:
            raise FailedPrecondition(f"ingest {ref!r} has {total} bytes, and {size} are expected")
        if expected and digest != expected:
            raise FailedPrecondition(f"ingest {ref!r} has the digest {digest}, and {expected} is expected")
        return digest, total

    async def _turn(
        self, namespace: str, ref: str, writer: Writer, digest: str, total: int, labels: dict[str, str]
    ) -> Info:
        try:
            info = await self._place(namespace, ref, writer.held, digest, total, labels, linked=writer.linked > 0)
        except AlreadyExists:
            await self._drop(namespace, ref, missing_ok=True)
            raise
        await self._release((namespace, ref), writer, keep=False)
        return info

    async def put(self, namespace: str, data: bytes, expected: str, labels: dict[str, str], keep: Keep) -> Info:
        """A small blob whole; `keep(digest)` is awaited before anyone can see it."""
        algorithm = check_digest(expected).partition(":")[0]
        if len(data) > CHUNK:
            raise InvalidArgument(f"blob {expected}: {len(data)} bytes at once are more than {CHUNK}")
        found = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
        if found != expected:
            raise FailedPrecondition(f"the bytes have the digest {found}, and {expected} is expected")
        return await self._finish(self._put(namespace, data, expected, labels, keep))

    async def _put(self, namespace: str, data: bytes, digest: str, labels: dict[str, str], keep: Keep) -> Info:
        if await self.present(namespace, digest):
            await keep(digest)  # before the second look, so it cannot go in between
            if await self.present(namespace, digest):
                await self._metadata.refuse(AlreadyExists(f"blob {digest}: already exists"))
        whole = self._backend.whole(data, digest, f"blob {digest}")
        try:
            done = await asyncio.gather(whole.seal(), keep(digest), return_exceptions=True)
            if failed := [e for e in done if e is not None]:
                await self._take_back(whole, digest)
                raise failed[0]
            return await self._place(namespace, "", whole, digest, len(data), labels)
        finally:
            await whole.close()

    async def _place(
        self, namespace: str, ref: str, held: Settling, digest: str, size: int, labels: dict[str, str], *,
        linked: bool = False,
    ) -> Info:  # fmt: skip
        """The ingest becomes a blob: file and row in one transaction; the one that is there already is kept."""

        def place(known: bool) -> None:
            if known and self._backend.has(digest, size):
                return
            if linked:
                raise Aborted(f"ingest {ref!r}: blob {digest} is gone from where it was to be had: send its bytes")
            held.settle(digest, size)

        try:
            return await self._metadata.commit(namespace, ref, digest, size, labels, place)
        except AlreadyExists:
            raise
        except WherryError:
            await self._take_back(held, digest)
            raise

    async def _take_back(self, held: Settling, digest: str) -> None:
        """The bytes are no blob after all; what is left of the name is removed at the next start."""
        with suppress(WherryError):
            await self._metadata.unless_known(digest, lambda: held.unsettle(digest))

    async def close(self, namespace: str, ref: str) -> None:
        """Let go of an ingest held here; its bytes stay."""
        writer = self._writer(namespace, ref)
        async with writer.lock:
            self._check_current(namespace, ref, writer)
            await self._release((namespace, ref), writer)

    async def status(self, namespace: str, ref: str) -> Ingest:
        """How far an ingest is. To ask is to care: it keeps the ingest held."""
        row = self._metadata.ingest(namespace, ref)
        if row is None:
            raise NotFound(f"ingest {ref!r}: not found")
        await self._backend.touch(ingest_key(namespace, ref))
        return await self._progress(namespace, row)

    async def statuses(self, namespace: str, filters: Sequence[str]) -> list[Ingest]:
        return [await self._progress(namespace, row) for row in self._metadata.ingests(namespace, filters)]

    async def abort(self, namespace: str, ref: str) -> None:
        """Remove an ingest and its bytes, also from under its writer."""
        await self._finish(self._drop(namespace, ref, missing_ok=False))

    # ---- within

    async def _progress(self, namespace: str, row: Ingest) -> Ingest:
        if row.offset:  # a blob stands for its bytes
            return row.model_copy(update={"durable": row.offset})
        progress = await self._backend.progress(ingest_key(namespace, row.ref))
        if progress is None:
            return row
        updated_at = max(progress.updated_at, row.started_at)  # a file's clock is up to 10 ms behind
        return row.model_copy(update={"offset": progress.offset, "durable": progress.durable, "updated_at": updated_at})

    async def _drop(self, namespace: str, ref: str, *, missing_ok: bool) -> None:
        key = ingest_key(namespace, ref)
        await self._metadata.forget(namespace, ref, lambda: self._backend.detach(key), missing_ok=missing_ok)
        writer = self._writers.get((namespace, ref))
        if writer is not None:
            await self._release((namespace, ref), writer, keep=False)
        await self._backend.purge()

    def _writer(self, namespace: str, ref: str) -> Writer:
        writer = self._writers.get((namespace, ref))
        if writer is None:
            raise NotFound(f"ingest {ref!r} is not open here: open it again")
        return writer

    def _check_current(self, namespace: str, ref: str, writer: Writer) -> None:
        """The ingest may have been let go while its lock was awaited."""
        if self._writers.get((namespace, ref)) is not writer:
            raise NotFound(f"ingest {ref!r} is not open here any more: open it again")

    async def _release(self, name: tuple[str, str], writer: Writer, *, keep: bool = True) -> None:
        if self._writers.get(name) is writer:
            del self._writers[name]
        await writer.held.release(keep=keep)

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end even when the caller's deadline passes: a step between file and row is not left half done."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody waits after a deadline

    async def _watch_writers(self) -> None:
        while True:
            await asyncio.sleep(min(self._idle / 4, 5.0))
            try:
                for name, writer in list(self._writers.items()):
                    await self._let_go_if_idle(name, writer)
                await self._backend.tidy()
            except (WherryError, OSError):  # it goes on: what failed is tried again
                log.exception("looking after the open ingests failed")

    async def _let_go_if_idle(self, name: tuple[str, str], writer: Writer) -> None:
        try:
            activity = writer.held.activity()
        except NotFound:  # aborted at another replica: give its bytes back
            await self._release(name, writer, keep=False)
            return
        if activity != writer.seen:
            writer.seen, writer.since = activity, time.monotonic()
        elif time.monotonic() - writer.since > self._idle and not writer.lock.locked():
            log.info("ingest %r of %s: nobody wrote for %.0f s, it is let go", name[1], name[0], self._idle)
            await self._release(name, writer)


def ingest_key(namespace: str, ref: str) -> str:
    """The key of an ingest on its backend."""
    return hashlib.sha256(f"{namespace}/{ref}".encode()).hexdigest()


def _named(e: BaseException, ref: str) -> BaseException:
    if isinstance(e, ResourceExhausted) and repr(ref) not in e.message:
        return ResourceExhausted(f"ingest {ref!r}: {e.message}")
    return e
