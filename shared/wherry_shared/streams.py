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
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import BinaryIO

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
from .files import os_errors

WINDOW = 6
"""Chunks in flight: 3 MiB cover the delay of the bus."""
LOCAL_CHUNK = 1 << 20
PATIENCE = 30.0
"""Seconds to try again when the service is away or another writer holds the ref, where the context has no deadline."""
CARE_SECONDS = 15.0
_LOST = (Unavailable, NotFound, OutOfRange, DeadlineExceeded)
"""What a writer gets when its instance went away, let go of the ingest, or lost one of several chunks in flight."""


# ---- out


async def local_blob(content: Content, digest: str) -> BinaryIO | None:
    """The blob's file, opened for reading, if this is the host that it lies on; close it. NotFound."""
    located = await content.locate(digest)
    fd = _open_located(located, digest)
    return None if fd is None else os.fdopen(fd, "rb")


async def read_blob(
    content: Content, digest: str, *, offset: int = 0, window: int = WINDOW, local: bool = True, verify: bool = False
) -> AsyncIterator[bytes]:
    """The bytes of a blob from `offset`, in pieces of up to 1 MiB, `window` of them asked for ahead.

    local: read the file if it is on this host. verify: at the end raise DataLoss unless the digest is right (from
    offset 0 only). NotFound, OutOfRange; DataLoss when bytes are missing.
    """
    located = await content.locate(digest)
    if offset > located.size or offset < 0:
        raise OutOfRange(f"blob {digest}: offset {offset} is past its end, {located.size}")
    fd = _open_located(located, digest) if local else None
    try:
        if fd is None:
            chunks = _remote_chunks(content, digest, offset, located.size, window)
        else:
            chunks = _local_chunks(fd, digest, offset, located.size)
        check = hashlib.new(digest.partition(":")[0]) if verify and not offset else None
        async for chunk in chunks:
            if check is not None:
                check.update(chunk)
            yield chunk
        if check is not None and check.hexdigest() != digest.partition(":")[2]:
            raise DataLoss(f"blob {digest}: its bytes have the digest {check.name}:{check.hexdigest()}")
    finally:
        if fd is not None:
            os.close(fd)


def _open_located(located: Located, digest: str) -> int | None:
    if not located.path.endswith(blob_file(digest)):
        return None
    return _open_same(located.path, os.O_RDONLY, located.device, located.inode)


def _open_same(path: str, flags: int, device: int, inode: int) -> int | None:
    """The file if it is here and that very one. A service elsewhere names paths of its own host, which prove nothing."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    state = os.fstat(fd)
    if stat.S_ISREG(state.st_mode) and (state.st_dev, state.st_ino) == (device, inode):
        return fd
    os.close(fd)
    return None


async def _local_chunks(fd: int, digest: str, offset: int, size: int) -> AsyncIterator[bytes]:
    while offset < size:
        with os_errors(f"blob {digest}"):
            chunk = await asyncio.to_thread(os.pread, fd, min(LOCAL_CHUNK, size - offset), offset)
        if not chunk:
            raise DataLoss(f"blob {digest} ends at {offset}, and should have {size} bytes")
        yield chunk
        offset += len(chunk)


async def _remote_chunks(content: Content, digest: str, offset: int, size: int, window: int) -> AsyncIterator[bytes]:
    flying: deque[asyncio.Task[bytes]] = deque()
    try:
        while offset < size or flying:
            while offset < size and len(flying) < window:
                flying.append(asyncio.create_task(_read(content, digest, offset, min(CHUNK, size - offset))))
                offset += CHUNK
            yield await flying.popleft()
    finally:
        await _cancel(flying)


async def _read(content: Content, digest: str, offset: int, size: int) -> bytes:
    chunk = await _patiently(lambda: content.read(digest, offset, size), f"blob {digest}")
    if len(chunk) != size:
        raise DataLoss(f"blob {digest}: {len(chunk)} of {size} bytes came from offset {offset}")
    return chunk


# ---- in


async def write_blob(
    content: Content, ref: str, source: bytes | AsyncIterable[bytes], *, size: int = 0, expected: str = "",
    labels: dict[str, str] | None = None,
) -> Info:  # fmt: skip
    """Put a blob into content under the ingest `ref`; answers the one that is there when it is there already.

    What an earlier attempt left of the ingest is kept if `source` repeats it, and `expected` says whether it does.
    """
    try:
        async with BlobWriter(content, ref, total=size, expected=expected) as writer:
            if not expected:
                await writer.restart()
            return await _fill(writer, source, labels or {})
    except AlreadyExists:
        if not expected:
            raise
        return await content.info(expected)


async def _fill(writer: BlobWriter, source: bytes | AsyncIterable[bytes], labels: dict[str, str]) -> Info:
    skip = writer.offset
    if isinstance(source, bytes):
        await writer.write(source[skip:])
        try:
            return await writer.commit(labels=labels)
        except FailedPrecondition:
            if not skip:
                raise
            await writer.restart()  # what was there before was something else
            await writer.write(source)
    else:
        async for chunk in source:
            await writer.write(chunk[skip:])
            skip = max(0, skip - len(chunk))
    return await writer.commit(labels=labels)


class BlobWriter:
    """Writes one ingest: `async with BlobWriter(content, ref, ...) as writer`, `write` from `offset` on, `commit`.

    Entering waits while another writer holds the ref, until the context's deadline or for `patience` seconds
    (Unavailable), and raises AlreadyExists when the expected blob is there. Leaving without a commit keeps the
    ingest for the next writer. If the instance dies, the writer goes on at another one, or when it is back.
    One task at a time may use a writer.
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
        self._instance = content
        self._sink: _File | _Chunks | None = None
        self._care: asyncio.Task[None] | None = None

    @property
    def offset(self) -> int:
        """How many bytes are written, or on their way: where the source has to go on."""
        return self._out.end

    @property
    def is_local(self) -> bool:
        """Whether bytes go straight into the service's file."""
        return isinstance(self._sink, _File)

    @property
    def _out(self) -> _File | _Chunks:
        if self._sink is None:
            raise FailedPrecondition(f"ingest {self._ref!r} is not open: enter the writer first")
        return self._sink

    async def __aenter__(self) -> BlobWriter:
        opened = await self._open(truncate=self._truncate)
        fd = self._open_file(opened) if self._local else None
        if fd is None:
            self._sink = _Chunks(self._ref, opened.offset, self._window, self._send, self._recover)
        else:
            self._sink = _File(self._ref, fd, opened.offset)
        self._care = asyncio.create_task(self._keep_held())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def write(self, data: bytes) -> None:
        """Write on. Returns while the bytes are on their way; an error of theirs comes with a later call.

        ResourceExhausted: no space. Aborted: the ingest went away under the writer: begin again from a new one.
        """
        await self._out.write(data)

    async def restart(self) -> None:
        """Start over with no bytes."""
        await self._out.flush()
        if self.offset:
            await self._instance.write(self._ref, 0, b"")
            self._out.end = 0

    async def commit(self, size: int = 0, expected: str = "", labels: dict[str, str] | None = None) -> Info:
        """Verify and make it a blob; size and digest are what was given to the writer unless given here.

        FailedPrecondition: they differ, and the ingest stays. AlreadyExists: the blob was there.
        """
        await self._out.flush()
        size, expected = size or self._total, expected or self._expected
        end = self.offset
        for attempt in range(4):
            try:
                info = await self._instance.commit(self._ref, size or end, expected, labels or {})
                break
            except (Unavailable, NotFound, DeadlineExceeded):
                if attempt == 3 or _out_of_time():
                    raise
            try:
                await self._resume(end, end)
            except AlreadyExists:
                info = await self._content.info(expected)  # it had taken effect, and only the answer was lost
                break
        await self._end()
        return info

    async def abort(self) -> None:
        """Remove the ingest and its bytes."""
        await self._end(discard=True)
        with suppress(NotFound):
            await self._content.abort(self._ref)

    async def close(self) -> None:
        """Let go of the ingest and keep its bytes. A writer that is closed or committed is left alone."""
        if self._sink is None:
            return
        try:
            with suppress(Aborted, *_LOST):
                await self._sink.flush()
        finally:
            await self._end()
            with suppress(*_LOST):
                with context.use(timeout=2.0):
                    await self._instance.close(self._ref)

    # ---- within

    async def _end(self, *, discard: bool = False) -> None:
        sink, self._sink = self._sink, None
        if self._care is not None:
            self._care.cancel()
            self._care = None
        if sink is not None:
            await sink.end()

    async def _open(self, *, truncate: bool = False) -> Opened:
        opened = await _patiently(
            lambda: self._content.open(self._ref, self._total, self._expected, truncate),
            f"ingest {self._ref!r}", self._patience,
        )  # fmt: skip
        self._instance = at_instance(self._content, opened.instance)
        return opened

    def _open_file(self, opened: Opened) -> int | None:
        caller = getattr(self._content, "_caller", None)
        namespace = caller.namespace if isinstance(caller, Caller) else context.namespace()
        if not opened.path.endswith(ingest_file(namespace, self._ref)):
            return None
        return _open_same(opened.path, os.O_WRONLY | os.O_APPEND, opened.device, opened.inode)

    async def _send(self, offset: int, data: bytes) -> int:
        return await self._instance.write(self._ref, offset, data)

    async def _recover(self, low: int, high: int) -> int:
        return (await self._resume(low, high)).offset

    async def _resume(self, low: int, high: int) -> Opened:
        """Open the ingest again. Its end must lie between what was acknowledged and what was sent, else Aborted."""
        with suppress(WherryError), context.use(timeout=2.0):
            await self._instance.close(self._ref)  # if it is still there, it holds the lock
        opened = await self._open()
        if not low <= opened.offset <= high:
            with suppress(*_LOST):
                await self._instance.close(self._ref)
            raise Aborted(f"ingest {self._ref!r} has {opened.offset} bytes, and {low} were written: begin again")
        return opened

    async def _keep_held(self) -> None:
        """Care for the ingest while its source is slow, so that the service does not let go of it."""
        while True:
            await asyncio.sleep(CARE_SECONDS)
            with suppress(WherryError):
                await self._content.status(self._ref)


class _File:
    """Appends to a file of this host; one batch is written by a thread while the next one is filled."""

    def __init__(self, ref: str, fd: int, end: int) -> None:
        self._ref = ref
        self._fd = fd
        self.end = end
        self._batch: list[bytes] = []
        self._size = 0
        self._writing: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        self._batch.append(data)
        self._size += len(data)
        self.end += len(data)
        if self._size >= LOCAL_CHUNK:
            await self._turn()

    async def flush(self) -> None:
        await self._turn()
        await self._settled()

    async def end_(self) -> None: ...

    async def _turn(self) -> None:
        await self._settled()
        batch, self._batch, self._size = self._batch, [], 0
        if batch:
            self._writing = asyncio.create_task(asyncio.to_thread(self._append, batch))

    async def _settled(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    def _append(self, batch: list[bytes]) -> None: ...
