"""Descriptors of the caller's own, which others share and whose other ends may be slow, stopped or gone.

Nothing here blocks the loop: while output waits for its reader, signals are heard and other streams flow.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import stat
from collections.abc import AsyncGenerator, Iterator

CHUNK = 64 << 10
# A terminal with room for less than a line's end says that it can be written.
PAUSE_SECONDS = 0.05
# Of devices that are another one whenever they are opened, /dev/ptmx among them.
_TTYAUX_MAJOR = 5
# What a pipe takes in one piece once it takes anything: more might block.
PIECE = select.PIPE_BUF


def write_now(fd: int, data: bytes | memoryview) -> memoryview:
    """What the descriptor did not take, because it would have blocked. OSError: BrokenPipeError when nobody reads."""
    view = memoryview(data)
    with _unblocking(fd) as out:
        piece = len(view) if stat.S_ISREG(os.fstat(out).st_mode) else PIECE
        room = select.poll()
        room.register(out, select.POLLOUT)
        while view and room.poll(0):
            try:
                view = view[os.write(out, view[:piece]) :]
            except BlockingIOError:
                break
    return view


@contextlib.contextmanager
def _unblocking(fd: int) -> Iterator[int]:
    """The descriptor; of a terminal one that does not block, for nobody knows how much it has room for."""
    own = -1
    if os.isatty(fd) and os.major(os.fstat(fd).st_rdev) != _TTYAUX_MAJOR:
        with contextlib.suppress(OSError):  # it is somebody else's: su
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        yield fd if own < 0 else own
    finally:
        if own >= 0:
            os.close(own)


async def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of it, however long its reader takes. OSError: BrokenPipeError when nobody reads."""
    rest = write_now(fd, data)
    while rest:
        await ready(fd, select.EPOLLOUT)
        before, rest = len(rest), write_now(fd, rest)
        if len(rest) == before:
            await asyncio.sleep(PAUSE_SECONDS)


async def chunks(source: int | bytes) -> AsyncGenerator[bytes, None]:
    """Whatever comes from a descriptor, or the bytes that are there, in windows of CHUNK."""
    if isinstance(source, bytes):
        for begin in range(0, len(source), CHUNK):
            yield source[begin : begin + CHUNK]
        return
    waits = _can_be_polled(source)
    while True:
        if waits:
            await ready(source, select.EPOLLIN)
            data = os.read(source, CHUNK)
        else:
            data = await asyncio.to_thread(os.read, source, CHUNK)
        if not data:
            return
        yield data


def _can_be_polled(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)


async def ready(fd: int, events: int) -> None:
    """Return when a pipe, socket or terminal can be read (EPOLLIN) or written (EPOLLOUT).

    A loop that watched it itself would make it non-blocking, also for everybody who shares it, and leave it so: the
    caller's shell, and what runs in it next.
    """
    loop = asyncio.get_running_loop()
    come = asyncio.Event()
    with select.epoll() as watch:
        watch.register(fd, events)
        loop.add_reader(watch.fileno(), come.set)
        try:
            await come.wait()
        finally:
            loop.remove_reader(watch.fileno())
