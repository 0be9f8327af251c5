"""gzip and zstd streams, read and written in bounded pieces, in a thread of their own.

Which kind a stream is, its first bytes say. What is written depends on the bytes alone (no time, no name), so that
the same input gives the same digest.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Literal, Protocol

import zstandard
from wherry_shared.errors import DataLoss, ResourceExhausted

Kind = Literal["gzip", "zstd", "none"]

PIECE = 512 << 10
RATIO_MAX = 1000
"""The most bytes that may come out of a stream for each that goes in, once RATIO_AFTER have come out."""
RATIO_AFTER = 64 << 20
GZIP_LEVEL, ZSTD_LEVEL = 6, 3
_MAGIC = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd"}
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_ZSTD_WINDOW = 128 << 20  # what the zstd tool accepts without being asked for more


def kind_of(head: bytes) -> Kind:
    """What a stream is that begins with `head` (4 bytes tell)."""
    if head.startswith(_MAGIC["gzip"]):
        return "gzip"
    if head.startswith(_MAGIC["zstd"]) or int.from_bytes(head[:4], "little") in _SKIPPABLE:
        return "zstd"
    return "none"


# ---- out


def decompress(source: Iterator[bytes], what: str) -> Iterator[bytes]:
    """The plain bytes of a stream of either kind, in pieces of at most PIECE; a plain stream passes as it is.

    DataLoss: it is corrupt, or a gzip stream is cut off (of a zstd stream only what it holds tells). ResourceExhausted:
    it grows more than RATIO_MAX times.
    """
    stream = _Counted(source)
    kind = kind_of(stream.peek(4))
    if kind == "none":
        yield from iter(stream.read, b"")
        return
    done = 0
    for piece in _gunzip(stream, what) if kind == "gzip" else _unzstd(stream, what):
        done += len(piece)
        if done > RATIO_AFTER and done > RATIO_MAX * stream.size:
            raise ResourceExhausted(f"{what} grows more than {RATIO_MAX} times when it is decompressed")
        yield piece


class _Counted:
    """A source that tells how much was taken from it, and can be looked into."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self._source = source
        self._ahead = b""
        self.size = 0

    def peek(self, size: int) -> bytes:
        while len(self._ahead) < size and (chunk := next(self._source, b"")):
            self._ahead += chunk
        return self._ahead

    def read(self, _size: int = -1) -> bytes:
        chunk, self._ahead = self._ahead or next(self._source, b""), b""
        self.size += len(chunk)
        return chunk


def _gunzip(source: _Counted, what: str) -> Iterator[bytes]:
    data = source.read()
    while data:  # members one after another; zeros that pad the last one are no error (RFC 1952, 2.2)
        member = zlib.decompressobj(31)
        while not member.eof:
            if not data and not (data := source.read()):
                raise DataLoss(f"{what}: the gzip stream is cut off")
            try:
                piece = member.decompress(data, PIECE)
            except zlib.error as e:
                raise DataLoss(f"{what}: the gzip stream is corrupt: {e}") from None
            data = member.unconsumed_tail
            if piece:
                yield piece
        data = member.unused_data.lstrip(b"\0")
        while not data and (more := source.read()):
            data = more.lstrip(b"\0")


class _Readable:
    """A source as zstandard reads one: never more than it asked for."""

    def __init__(self, source: _Counted) -> None:
        self._source = source
        self._left = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        if not self._left:
            self._left = memoryview(self._source.read())
        piece, self._left = self._left[:size], self._left[size:]
        return bytes(piece)


def _unzstd(source: _Counted, what: str) -> Iterator[bytes]:
    machine = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    reader = machine.stream_reader(_Readable(source), read_size=PIECE, read_across_frames=True)  # type: ignore[arg-type]
    while True:
        try:
            piece = reader.read(PIECE)
        except zstandard.ZstdError as e:
            raise DataLoss(f"{what}: the zstd stream is corrupt: {e}") from None
        if not piece:
            return
        yield piece


# ---- in


class Compressor(Protocol):
    """What `compressor` answers."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class _Verbatim:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def compressor(kind: Kind, level: int = 0) -> Compressor:
    """A new stream of this kind; level 0 is the kind's usual one."""
    if kind == "gzip":
        return zlib.compressobj(level or GZIP_LEVEL, zlib.DEFLATED, 31)  # zlib writes neither time nor name
    if kind == "zstd":
        return zstandard.ZstdCompressor(level=level or ZSTD_LEVEL).compressobj()
    return _Verbatim()


# ---- threads


async def through(
    source: AsyncIterator[bytes], change: Callable[[Iterator[bytes]], Iterator[bytes]]
) -> AsyncGenerator[bytes, None]:
    """What `change` makes of the source. It runs in a thread of its own, a piece at a time and only when one is wanted.

    Close it (`contextlib.aclosing`) when it is not read to the end.
    """
    feed = _Feed(source)
    pieces = change(feed)
    # Of its own: it waits for the source, which may need one of the loop's threads itself.
    threads = ThreadPoolExecutor(1, "wherry-stream")
    try:
        while piece := await asyncio.get_running_loop().run_in_executor(threads, _next, pieces):
            yield piece
    finally:
        await feed.stop()
        threads.shutdown(wait=False)


def _next(pieces: Iterator[bytes]) -> bytes:
    return next((piece for piece in pieces if piece), b"")


class _Feed:
    """An async source for a thread: each step waits in the thread for one step in the loop."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._step: Future[bytes] | None = None
        self._task: asyncio.Task[bytes] | None = None
        self._stopped = False

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> bytes:
        if self._stopped:
            raise CancelledError
        self._step = asyncio.run_coroutine_threadsafe(self._one(), self._loop)
        if self._stopped:  # between the first look and the step's start
            self._step.cancel()
        chunk = self._step.result()
        if not chunk:
            raise StopIteration
        return chunk

    async def _one(self) -> bytes:
        self._task = asyncio.current_task()
        async for chunk in self._source:
            if chunk:
                return chunk
        return b""

    async def stop(self) -> None:
        """Let the thread end at its next step; the source is at rest then, and may be closed."""
        self._stopped = True
        if self._step is not None:
            self._step.cancel()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
