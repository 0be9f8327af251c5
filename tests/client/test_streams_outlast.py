"""Streams that outlast: output of an ended process whose reader is slow, the end of input while the node is away."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from housebus import PATIENCE
from wherry.outgoing import write_all
from wherry.stdio import Pipes, Stdio
from wherry.streaming import Streaming
from wherry.task import Process
from wherry_shared.api.task import Output
from wherry_shared.errors import Unavailable

SIZE = 200_000  # more than two pipes hold


class _Tasks:
    """Everything that a process wrote, in one answer, and its end."""

    async def output(self, *_: Any) -> Output:
        return Output(stdout=bytes(SIZE), next="e.r.1", ended=True)


async def _fifo(stdio: Stdio, state: Path) -> Pipes:
    pipes = Pipes(stdio, state, "default", "c")
    pipes.start(lambda: None)
    container = os.open(pipes.paths.stdout, os.O_WRONLY)
    pipes.started()

    async def write() -> None:
        try:
            await write_all(container, bytes(SIZE))
        finally:
            os.close(container)

    pipes.writing = asyncio.create_task(write())  # type: ignore[attr-defined]
    return pipes


async def _bus(stdio: Stdio, state: Path) -> Streaming:
    client: Any = SimpleNamespace(tasks=_Tasks())
    streams = Streaming(client, "c", "", stdio)
    streams.begin()
    streams.started()
    return streams


@pytest.mark.parametrize("way", [_fifo, _bus])
async def test_a_reader_that_looks_away_misses_nothing(way: Any, tmp_path: Path) -> None:
    """Whoever reads `exec ... | less` has turned to something else for longer than is waited for a process."""
    ours, theirs = os.pipe()
    streams = await way(Stdio(None, theirs, None), tmp_path)
    drained = asyncio.create_task(streams.drained(0.1))
    turns = 0
    for _ in range(20):  # and nothing else stands still meanwhile
        await asyncio.sleep(0.05)
        turns += 1
    assert turns == 20 and not drained.done()
    taking = asyncio.create_task(asyncio.to_thread(_all_of, ours))
    await asyncio.wait_for(drained, PATIENCE)
    streams.close()
    os.close(theirs)
    assert len(await taking) == SIZE


@pytest.mark.parametrize("way", [_fifo, _bus])
async def test_a_reader_that_has_gone_is_told_of(way: Any, tmp_path: Path) -> None:
    """And the process is not held up."""
    ours, theirs = os.pipe()
    os.close(ours)
    streams = await way(Stdio(None, theirs, None), tmp_path)
    with pytest.raises(BrokenPipeError):
        await asyncio.wait_for(streams.parted(), PATIENCE)
    await asyncio.wait_for(streams.drained(), PATIENCE)
    streams.close()
    os.close(theirs)


class _Away:
    """A node that is away for a moment, once the process runs."""

    told = 0

    async def start(self, *_: Any) -> int:
        return 7

    async def close_stdin(self, *_: Any) -> None:
        self.told += 1
        if self.told < 3:
            raise Unavailable("the process is not connected to NATS")


async def test_the_end_of_stdin_is_told_whatever_is_away(tmp_path: Path) -> None:
    client: Any = SimpleNamespace(tasks=_Away())
    process = Process(client, "c", "", Pipes(Stdio(b"in"), tmp_path, "default", "c"))
    process.carry()
    await process.start()
    async with asyncio.timeout(PATIENCE):
        while process._background or not process._stdin_ended:
            await asyncio.sleep(0.01)
    assert client.tasks.told == 3
    process.detach()


async def test_a_node_that_is_gone_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has ended is known by its streams; as long as they are open, it may just be without its services."""
    monkeypatch.setattr("wherry.task.OUTAGE_SECONDS", 0.2)

    async def away(*_: Any) -> None:
        raise Unavailable("the process is not connected to NATS")

    client: Any = SimpleNamespace(tasks=SimpleNamespace(wait=away))
    pipes = Pipes(Stdio(None, lambda _: None), tmp_path, "default", "c")
    process = Process(client, "c", "", pipes)
    process.carry()
    container = os.open(pipes.paths.stdout, os.O_WRONLY)
    pipes.started()
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(1.0)
    assert not waiting.done()
    os.close(container)
    with pytest.raises(Unavailable, match="how c ended"):
        await asyncio.wait_for(waiting, PATIENCE)
    process.detach()


def _all_of(fd: int) -> bytes:
    with open(fd, "rb") as pipe:
        return pipe.read()


async def test_a_terminal_that_nobody_reads_holds_nothing_else_up() -> None:
    """How much it has room for, nobody can tell: a piece that does not fit must not block."""
    master, slave = os.openpty()
    lines = b"y\n" * 100_000
    try:
        writing = asyncio.create_task(write_all(slave, lines))
        await asyncio.sleep(0.2)
        assert not writing.done() and os.get_blocking(slave)
        got = bytearray()
        while len(got) < len(lines) * 3 // 2:  # a line's end becomes two
            got += await asyncio.to_thread(os.read, master, 65536)
        await writing
        assert got == lines.replace(b"\n", b"\r\n")
    finally:
        os.close(master)
        os.close(slave)
