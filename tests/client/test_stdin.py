"""What a process is given to read over a FIFO, which it may leave there."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from wherry.stdio import Pipes, Stdio


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


async def test_input_that_nobody_reads_is_let_go_of(tmp_path: Path) -> None:
    """A process that ends with more waiting for it than a FIFO holds."""
    threads, tasks, fds = threading.active_count(), asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))
    ended: list[None] = []
    pipes = Pipes(Stdio(b"x" * (1 << 20)), tmp_path, "default", "c")
    pipes.start(lambda: ended.append(None))
    await asyncio.sleep(0)
    assert threading.active_count() == threads
    working = asyncio.all_tasks() - tasks
    pipes.close()
    await asyncio.wait(working)
    assert asyncio.all_tasks() == tasks and len(os.listdir("/proc/self/fd")) == fds
    assert not ended and not any((tmp_path / "fifo").iterdir())


async def test_what_comes_after_the_process_is_the_callers(tmp_path: Path, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    tasks = asyncio.all_tasks()
    pipes = Pipes(Stdio(reader), tmp_path, "default", "c")
    pipes.start(lambda: None)
    os.write(writer, b"for the process")
    with open(os.open(pipes.paths.stdin, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as stdin:
        async with asyncio.timeout(20):
            while not (got := stdin.read(100)):
                await asyncio.sleep(0.01)
    assert got == b"for the process"
    working = asyncio.all_tasks() - tasks
    pipes.close()
    await asyncio.wait(working)
    os.write(writer, b"for the caller")
    await asyncio.sleep(0)
    assert os.read(reader, 100) == b"for the caller"


async def test_all_of_it_arrives_however_slowly_it_is_read(tmp_path: Path) -> None:
    data, ended = os.urandom(1 << 20), asyncio.Event()
    pipes = Pipes(Stdio(data), tmp_path, "default", "c")
    got = bytearray()
    with open(os.open(pipes.paths.stdin, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as stdin:
        pipes.start(ended.set)
        async with asyncio.timeout(60):
            while not ended.is_set() or len(got) < len(data):
                got += stdin.read(7000) or b""
                await asyncio.sleep(0)
    assert got == data
    pipes.close()
