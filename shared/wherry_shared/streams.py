"""The client's half of moving bytes: blobs out of a content service, and blobs into one.

On the content service's own host no byte crosses the bus: it tells where a file lies, and whoever sees that very
file (same device and inode) reads it, or appends to it. From afar chunks are asked for or sent, several in flight.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import stat
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import BinaryIO, TypeVar

from . import context
from .api.content import CHUNK, Content, Info, Located, Opened, blob_file, ingest_file
from .bus.proxy import Caller, at_instance
from .errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    OutOfRange,
    Unavailable,
    WherryError,
)  # fmt: skip
from .files import OwnedFd, os_errors
from .heap import keep_heap
from .sinks import ATTEMPTS, LOCAL_CHUNK, Chunks, File, Sink, cancel

T = TypeVar("T")

WINDOW = 6
"""Chunks in flight: 3 MiB cover the delay of the bus."""
INLINE = 64 << 10  # bytes of a file that are read sooner than a thread is told to: a manifest, a config
PATIENCE = 30.0
"""Seconds to try again when the service is away or another writer holds the ref, where the context has no deadline."""
LEAVE_SECONDS = 2.0  # for the answer to a request that nobody wants any more
CARE_SECONDS = 15.0


# ---- out


async def local_blob(content: Content, digest: str) -> BinaryIO | None:
    """The blob's file, opened for reading, if this is the host that it lies on; close it. NotFound."""
    located = await content.locate(digest)
    fd = _open_located(located, digest)
    return None if fd is None else os.fdopen(fd, "rb")


async def read_blob(
    content: Content, digest: str, *, offset: int = 0, window: int = WINDOW, local: bool = True, verify: bool = False
) -> AsyncGenerator[bytes, None]:
    """The bytes of a blob from `offset`, in pieces of up to 1 MiB, `window` of them asked for ahead.

    local: read the file if it is on this host. verify: at the end raise DataLoss unless the digest is right (from
    offset 0 only). NotFound, OutOfRange; DataLoss when bytes are missing.
    """
    located = await content.locate(digest)
    if not 0 <= offset <= located.size:
        raise OutOfRange(f"blob {digest}: offset {offset} is not within its {located.size} bytes")
    fd = _open_located(located, digest) if local else None
    if fd is None:
        chunks = _remote_chunks(content, digest, offset, located.size, window)
    else:
        chunks = _local_chunks(OwnedFd(fd), digest, offset, located.size)
    check = hashlib.new(digest.partition(":")[0]) if verify and not offset else None
    async with aclosing(chunks):
        async for chunk in chunks:
            if check is not None:
                check.update(chunk)
            yield chunk
    if check is not None and check.hexdigest() != digest.partition(":")[2]:
        raise DataLoss(f"blob {digest} is rotten: its bytes have the digest {check.name}:{check.hexdigest()}")


def _open_located(located: Located, digest: str) -> int | None:
    if not located.path.endswith(blob_file(digest)):
        return None
    return _open_same(located.path, os.O_RDONLY, located.device, located.inode)


def _open_same(path: str, flags: int, device: int, inode: int) -> int | None:
    """The file if it is here and that very one: a service elsewhere names a path of its own host."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    state = os.fstat(fd)
    if stat.S_ISREG(state.st_mode) and (state.st_dev, state.st_ino) == (device, inode):
        return fd
    os.close(fd)
    return None


async def _local_chunks(file: OwnedFd, digest: str, offset: int, size: int) -> AsyncGenerator[bytes, None]:
    while offset < size:
        length = min(LOCAL_CHUNK, size - offset)
        with os_errors(f"blob {digest}"):
            if length <= INLINE:
                chunk = _pread(file, length, offset)
            else:
                chunk = await asyncio.to_thread(_pread, file, length, offset)
        if not chunk:
            raise DataLoss(f"blob {digest} ends at {offset}, and should have {size} bytes")
        yield chunk
        offset += len(chunk)


def _pread(file: OwnedFd, size: int, offset: int) -> bytes:
    return os.pread(file.fd, size, offset)


async def _remote_chunks(
    content: Content, digest: str, offset: int, size: int, window: int
) -> AsyncGenerator[bytes, None]:
    flying: deque[asyncio.Task[bytes]] = deque()
    if size - offset > CHUNK:
        keep_heap()
    try:
        while offset < size or flying:
            while offset < size and len(flying) < window:
                flying.append(asyncio.create_task(_read(content, digest, offset, min(CHUNK, size - offset))))
                offset += CHUNK
            yield await flying[0]
            flying.popleft()
    finally:
        await cancel(flying)


async def _read(content: Content, digest: str, offset: int, size: int) -> bytes:
    chunk = await _patiently(lambda: content.read(digest, offset, size), PATIENCE)
    if len(chunk) != size:
        raise DataLoss(f"blob {digest}: {len(chunk)} of {size} bytes came from offset {offset}")
    return chunk


async def _patiently(call: Callable[[], Awaitable[T]], patience: float) -> T:
    """Call until it is no longer Unavailable, or there is no time left (the context's, else `patience` seconds)."""
    give_up = time.time() + context.current().remaining(patience)
    pause = 0.02
    while True:
        try:
            return await call()
        except Unavailable:
            if time.time() + pause >= give_up:
                raise
        await asyncio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - jitter
        pause = min(pause * 2, 1.0)


# ---- in


async def write_blob(
    content: Content, ref: str, source: bytes | AsyncIterable[bytes], *, size: int = 0, expected: str = "",
    labels: dict[str, str] | None = None, local: bool = True,
) -> Info:  # fmt: skip
    """Put a blob into content under the ingest `ref`; answers the one that is there when `expected` is.

    With `expected`, what an earlier attempt left of the ingest is kept, and `source` must repeat it; nothing is taken
    from it when the service has the bytes already (`BlobWriter.complete`).
    """
    try:
        async with BlobWriter(content, ref, total=size, expected=expected, local=local) as writer:
            if not expected:
                await writer.restart()
            return await _fill(writer, source, labels or {})
    except AlreadyExists:
        if not expected:
            raise
        return await content.info(expected)


async def _fill(writer: BlobWriter, source: bytes | AsyncIterable[bytes], labels: dict[str, str]) -> Info:
    if writer.complete:
        try:
            return await writer.commit(labels=labels)
        except Aborted:
            await writer.restart()
    skip = writer.offset
    if not isinstance(source, bytes):
        async for chunk in source:
            await writer.write(chunk[skip:])
            skip = max(0, skip - len(chunk))
        return await writer.commit(labels=labels)
    await writer.write(source[skip:])
    try:
        return await writer.commit(labels=labels)
    except FailedPrecondition:
        if not skip:
            raise
    await writer.restart()  # what was there before was something else
    await writer.write(source)
    return await writer.commit(labels=labels)


class BlobWriter:
    """Writes one ingest: `async with BlobWriter(content, ref, ...) as writer`, `write` from `offset` on, `commit`.

    Entering waits while another writer holds the ref, until the context's deadline or for `patience` seconds
    (Unavailable), and raises AlreadyExists when the expected blob is there. Leaving without a commit keeps the
    ingest for the next writer. If its instance dies, the writer goes on at another one, or when it is back: from
    where it was, and after a power cut, which takes what was not durable yet, from there: `copy_from` reads it again,
    and a `write` or `commit` raises Unavailable, with `offset` where the source has to go on.
    complete: another namespace shares the blob, nothing need be written: commit. One task at a time may use a writer.
    """

    def __init__(
        self, content: Content, ref: str, *, total: int = 0, expected: str = "", truncate: bool = False,
        local: bool = True, window: int = WINDOW, patience: float = PATIENCE,
    ) -> None:  # fmt: skip
        self._content = content
        self._ref = ref
        self._total = total
        self._expected = expected
        self._truncate = truncate
        self._local = local
        self._window = window
        self._patience = patience
        self.complete = False
        self._instance = content
        self._sink: Sink | None = None
        self._setbacks = 0
        self._care: asyncio.Task[None] | None = None

    @property
    def offset(self) -> int:
        """How many bytes are written, or on their way: where the source has to go on."""
        return self._out.end

    @property
    def is_local(self) -> bool:
        """Whether bytes go straight into the service's file."""
        return isinstance(self._sink, File)

    @property
    def _out(self) -> Sink:
        if self._sink is None:
            raise FailedPrecondition(f"ingest {self._ref!r} is not open: enter the writer first")
        return self._sink

    async def __aenter__(self) -> BlobWriter:
        opening = asyncio.ensure_future(self._open(truncate=self._truncate))
        try:
            opened = await asyncio.shield(opening)
        except asyncio.CancelledError:
            await self._leave_unopened(opening)
            raise
        self._attach(opened)
        self._care = asyncio.create_task(self._keep_held())
        return self

    async def _leave_unopened(self, opening: asyncio.Future[Opened]) -> None:
        """What was asked for is made, whoever waits for it: so it is let go of, and whoever aborts it finds it."""
        with suppress(WherryError, TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                self._attach(await opening)
            await self.close()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def write(self, data: bytes | memoryview) -> None:
        """Write on. Returns while bytes are on their way; what goes wrong with them is raised by a later call.
        A view must stay as it is until the next call of any method returns.

        ResourceExhausted: no space. Aborted: the ingest went away under the writer; begin again with a new one.
        """
        await self._out.write(data)

    async def copy_from(self, source: BinaryIO) -> None:
        """Write what a file has from `offset` on to its end, and again what a lost service has not kept of it.

        Raises what `write` does, Unavailable only when the service does not come back.
        """
        known = self._setbacks
        while True:
            try:
                await self._out.copy(source.fileno())
                await self._out.flush()
                return
            except Unavailable:
                if self._setbacks == known:
                    raise
                known = self._setbacks

    async def restart(self) -> None:
        """Start over with no bytes."""
        if not self._out.end:
            return
        with suppress(WherryError):
            await self._out.flush()
        await self._let_go()
        self._attach(await self._open(truncate=True))

    async def commit(self, size: int = 0, expected: str = "", labels: dict[str, str] | None = None) -> Info:
        """Verify and make it a blob; size and digest are those given to the writer unless given here.

        FailedPrecondition: they differ, and the ingest stays. AlreadyExists: the blob was there.
        """
        await self._out.flush()
        expected = expected or self._expected
        try:
            info = await self._commit(size or self._total or self.offset, expected, labels or {})
        except AlreadyExists:  # the ingest is gone: who has the ref from now on is somebody else, and keeps it
            await self._end()
            raise
        await self._end()
        return info

    async def abort(self) -> None:
        """Remove the ingest and its bytes."""
        await self._end()
        with suppress(NotFound), context.use(key=""):
            await self._content.abort(self._ref)

    async def close(self) -> None:
        """Let go of the ingest and keep its bytes. A second call, or one after the commit, does nothing."""
        if self._sink is None:
            return
        try:
            with suppress(WherryError):  # it was raised before, or tells the next writer's offset
                await self._sink.flush()
        finally:
            await self._end()
            await self._let_go()

    # ---- within

    def _attach(self, opened: Opened) -> None:
        self.complete = opened.complete
        fd = self._open_file(opened) if self._local else None
        if fd is None:
            self._sink = Chunks(opened.offset, self._window, self._send, self._resume)
        else:
            self._sink = File(f"ingest {self._ref!r}", OwnedFd(fd), opened.offset)

    def _open_file(self, opened: Opened) -> int | None:
        caller = getattr(self._content, "_caller", None)
        namespace = caller.namespace if isinstance(caller, Caller) else context.namespace()
        if not opened.path.endswith(ingest_file(namespace, self._ref)):
            return None
        return _open_same(opened.path, os.O_WRONLY | os.O_APPEND, opened.device, opened.inode)

    async def _commit(self, size: int, expected: str, labels: dict[str, str]) -> Info:
        end = self.offset
        for _ in range(ATTEMPTS):
            try:
                with context.use(key=""):
                    return await self._instance.commit(self._ref, size, expected, labels)
            except (Unavailable, NotFound, DeadlineExceeded) as e:
                error: WherryError = e
            try:
                await self._resume(end, end)
            except AlreadyExists:  # the commit had taken effect, and only its answer was lost
                return await self._content.info(expected)
        raise error

    async def _open(self, *, truncate: bool = False) -> Opened:
        async def call() -> Opened:
            with context.use(key=""):  # a key that the caller set names one effect, and these are several
                return await self._content.open(self._ref, self._total, self._expected, truncate)

        opened = await _patiently(call, self._patience)
        self._instance = at_instance(self._content, opened.instance)
        return opened

    async def _send(self, offset: int, data: bytes) -> int:
        with context.use(key=""):
            return await self._instance.write(self._ref, offset, data)

    async def _resume(self, low: int, high: int) -> int:
        """Open the ingest again; answers its end, which lies between what was acknowledged and what was sent.

        Unavailable: it has less, and `offset` is there now. Aborted: it was taken away or written by somebody else.
        """
        await self._let_go()  # if the instance is alive, it holds the lock
        opened = await self._open()
        if low <= opened.offset <= high:
            return opened.offset
        if not 0 < opened.offset < low or opened.complete:
            await self._let_go()
            raise Aborted(f"ingest {self._ref!r} has {opened.offset} bytes, and had {low}: begin again")
        await self._out.drop()
        self._attach(opened)
        self._setbacks += 1
        raise Unavailable(f"ingest {self._ref!r} lost its service, and has {opened.offset} of {low} bytes: go on there")

    async def _let_go(self) -> None:
        with suppress(WherryError), context.use(timeout=2.0, key=""):
            await self._instance.close(self._ref)

    async def _end(self) -> None:
        sink, self._sink = self._sink, None
        if self._care is not None:
            self._care.cancel()
            self._care = None
        if sink is not None:
            await sink.drop()

    async def _keep_held(self) -> None:
        """Care for the ingest while its source is slow, so that the service does not let go of it."""
        while True:
            await asyncio.sleep(CARE_SECONDS)
            with suppress(WherryError):
                await self._content.status(self._ref)
