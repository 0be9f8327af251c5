"""Descriptors of the caller's own, which others share and whose other ends may be slow, stopped or gone.

Nothing here blocks the loop: while output waits for its reader, signals are heard and other streams flow.
"""

from __future__ import annotations

import asyncio
import os
import select
import stat

# What a pipe takes in one piece once it takes anything: more might block.
PIECE = select.PIPE_BUF


def write_now(fd: int, data: bytes | memoryview) -> memoryview:
    """What the descriptor did not take, because it would have blocked. OSError: BrokenPipeError when nobody reads."""
    view = memoryview(data)
    piece = len(view) if stat.S_ISREG(os.fstat(fd).st_mode) else PIECE
    room = select.poll()
    room.register(fd, select.POLLOUT)
    while view and room.poll(0):
        try:
            view = view[os.write(fd, view[:piece]) :]
        except BlockingIOError:
            break
    return view


async def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of it, however long its reader takes. OSError: BrokenPipeError when nobody reads."""
    rest = write_now(fd, data)
    while rest:
        await ready(fd, select.EPOLLOUT)
        rest = write_now(fd, rest)


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
