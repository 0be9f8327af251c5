"""Where the bytes of a BlobWriter go: a file of this host, or chunks to the instance that holds the ingest."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from .api.content import CHUNK
from .errors import DeadlineExceeded, NotFound, OutOfRange, Unavailable
from .files import OwnedFd, os_errors
from .heap import keep_heap

LOCAL_CHUNK = 1 << 20
COPY_STEP = 64 << 20  # bytes copied in a thread before a cancellation is looked for
ATTEMPTS = 5
LOST = (Unavailable, NotFound, OutOfRange, DeadlineExceeded)
"""What a writer gets when its instance went away, let go of the ingest, or lost one of several chunks in flight."""
_BATCH_MAX = 512  # buffers of one writev(2), which takes 1024


class Sink(Protocol):
    """Where a writer's bytes go. `end` counts all that it was given."""

    end: int

    async def write(self, data: bytes | memoryview) -> None:
        """Write on. A view must stay as it is until the next call of any method returns."""
        ...

    async def copy(self, source: int) -> None:
        """Write what the open file `source` has from `end` on."""
        ...

    async def flush(self) -> None: ...
    async def drop(self) -> None: ...


class File:
    """Appends to a file of this host: a thread writes one batch while the next one is filled."""

    def __init__(self, what: str, file: OwnedFd, end: int) -> None:
        self._what = what
        self._file = file
        self.end = end
        self._batch: list[bytes | memoryview] = []
        self._size = 0
        self._writing: asyncio.Task[Any] | None = None

    async def write(self, data: bytes | memoryview) -> None:
        if not data:
            return
        self._batch.append(data)
        self._size += len(data)
        self.end += len(data)
        if self._size >= LOCAL_CHUNK or len(self._batch) == _BATCH_MAX or isinstance(data, memoryview):
            await self._turn()

    async def copy(self, source: int) -> None:
        await self.flush()
        left = True
        while left:
            self._writing = asyncio.create_task(asyncio.to_thread(_copy, self._file, source, self.end, self._what))
            copied = await asyncio.shield(self._writing)
            self.end += copied
            left = copied == COPY_STEP
            self._writing = None

    async def flush(self) -> None:
        await self._turn()
        await self._settled()

    async def drop(self) -> None:
        self._batch = []
        if self._writing is not None:
            await asyncio.wait([self._writing])  # it goes on even if this is cancelled, and then closes the file
        self._file.close()

    async def _turn(self) -> None:
        await self._settled()
        batch, self._batch, self._size = self._batch, [], 0
        if batch:
            self._writing = asyncio.create_task(asyncio.to_thread(_append, self._file, batch, self._what))

    async def _settled(self) -> None:
        if self._writing is not None:
            await asyncio.shield(self._writing)  # a failed one stays, and fails every later call
            self._writing = None


def _copy(file: OwnedFd, source: int, offset: int, what: str) -> int:
    """Append up to COPY_STEP bytes of another file, through one buffer; answers how many."""
    view, done = memoryview(bytearray(LOCAL_CHUNK)), 0
    with os_errors(what):
        while done < COPY_STEP and (count := os.preadv(source, [view[: COPY_STEP - done]], offset + done)):
            left = view[:count]
            while left:
                left = left[os.write(file.fd, left) :]
            done += count
    return done


def _append(file: OwnedFd, batch: list[bytes | memoryview], what: str) -> None:
    with os_errors(what):
        left = [memoryview(data) for data in batch]
        while left:
            done = os.writev(file.fd, left)
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if done:
                left[0] = left[0][done:]


class Chunks:
    """Sends chunks to the instance that holds the ingest, a window of them in flight, and again what got lost."""

    def __init__(
        self, end: int, window: int, send: Callable[[int, bytes], Awaitable[int]],
        resume: Callable[[int, int], Awaitable[int]],
    ) -> None:  # fmt: skip
        self.end = end
        self._sent = end
        self._window = window
        self._send = send
        self._resume = resume
        self._buffer = bytearray()
        self._flying: deque[tuple[int, bytes, asyncio.Task[int]]] = deque()
        self._failures = 0

    async def write(self, data: bytes | memoryview) -> None:
        self.end += len(data)
        if not self._buffer and len(data) == CHUNK:
            await self._launch(bytes(data))
            return
        self._buffer += data
        while len(self._buffer) >= CHUNK:
            await self._launch(bytes(memoryview(self._buffer)[:CHUNK]))
            del self._buffer[:CHUNK]

    async def copy(self, source: int) -> None:
        await self.flush()
        while data := await asyncio.to_thread(os.pread, source, CHUNK, self.end):
            await self.write(data)

    async def flush(self) -> None:
        if self._buffer:
            await self._launch(bytes(self._buffer))
            self._buffer.clear()
        while self._flying:
            await self._settle()

    async def drop(self) -> None:
        await cancel(task for _, _, task in self._flying)

    async def _launch(self, chunk: bytes) -> None:
        if self._flying:
            keep_heap()
        while len(self._flying) >= self._window:
            await self._settle()
        self._fly(self._sent, chunk)
        self._sent += len(chunk)

    def _fly(self, offset: int, chunk: bytes) -> None:
        self._flying.append((offset, chunk, asyncio.ensure_future(self._send(offset, chunk))))

    async def _settle(self) -> None:
        """Wait for the oldest chunk; when it got lost, send again from where the ingest ends now."""
        try:
            await self._flying[0][2]
            self._flying.popleft()
            self._failures = 0
        except LOST:
            self._failures += 1
            if self._failures > ATTEMPTS:
                raise
            await self._again()

    async def _again(self) -> None:
        await cancel(task for _, _, task in self._flying)
        start = await self._resume(self._flying[0][0], self._sent)
        lost = [(offset, chunk) for offset, chunk, _ in self._flying]
        self._flying.clear()
        for offset, chunk in lost:
            if offset + len(chunk) > start:
                skip = max(0, start - offset)
                self._fly(offset + skip, chunk[skip:])


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait for their end."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
