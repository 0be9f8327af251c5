"""What the task service must do, through its proxy, over each real runtime: states, refusals, ends, and events."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from housebus import PATIENCE
from task_house import RUNTIMES, SH, House, exec_of, gate, gone, house_of, parent_of
from wherry_shared import context
from wherry_shared.api.task import Stdio, Tasks
from wherry_shared.bus import Bus
from wherry_shared.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unknown,
    WherryError,
)
from wherry_shared.sqlite import Database
from wherry_task import metadata


@pytest.fixture(params=RUNTIMES)
async def house(request: pytest.FixtureRequest, bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    async with house_of(bus, tmp_path, request.param) as made:
        yield made


async def test_a_whole_life(house: House) -> None:
    async with await house.bus.subscribe(namespace="default", topic="") as events:
        id = await house.container("/bin/sh", "-c", "exit 3")
        pid = await house.tasks.create(id, house.mounts)
        assert os.path.exists(f"/proc/{pid}")
        state = await house.tasks.get(id)
        assert (state.status, state.pid, state.exit_status) == ("created", pid, None)
        assert await house.tasks.start(id) == pid
        assert await house.exit(id) == 3
        state = await house.tasks.get(id)
        assert (state.status, state.exit_status) == ("stopped", 3) and state.exited_at is not None
        exit = await house.tasks.delete(id)
        assert (exit.exit_status, exit.pid) == (3, pid)
        for call in (house.tasks.get(id), house.tasks.start(id), house.tasks.delete(id), house.tasks.wait(id)):
            with pytest.raises(NotFound, match=id):
                await call
        topics = []
        async with asyncio.timeout(PATIENCE):
            async for event in events:
                topics.append(event.topic)
                if event.topic == "/tasks/delete":
                    break
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


async def test_refusals(house: House) -> None:
    with pytest.raises(NotFound, match="nobody"):
        await house.tasks.create("nobody", house.mounts)
    id = await house.created("/bin/sleep", "1000")
    with pytest.raises(AlreadyExists, match=id):
        await house.tasks.create(id, house.mounts)
    with pytest.raises(FailedPrecondition, match="created"):
        await house.tasks.pause(id)
    await house.tasks.start(id)
    with pytest.raises(FailedPrecondition, match="running"):
        await house.tasks.start(id)
    with pytest.raises(FailedPrecondition, match="running"):
        await house.tasks.delete(id)
    with pytest.raises(FailedPrecondition, match="running"):
        await house.tasks.resume(id)
    for number in (0, 65, -9):
        with pytest.raises(InvalidArgument):
            await house.tasks.kill(id, number)
    with pytest.raises(NotFound, match="nope"):
        await house.tasks.start(id, "nope")
    await house.tasks.kill(id, signal.SIGKILL)
    assert await house.exit(id) == 137
    with pytest.raises(NotFound, match="finished"):
        await house.tasks.kill(id, signal.SIGKILL)
    with pytest.raises(FailedPrecondition, match="stopped"):
        await house.tasks.pids(id)
    await house.tasks.delete(id)


async def test_what_the_runtime_says_comes_through(house: House) -> None:
    id = await house.container("/nonexistent")
    with pytest.raises(WherryError, match=r"nonexistent|No such file|not found"):
        await house.tasks.create(id, house.mounts)
        await house.tasks.start(id)
    with contextlib.suppress(NotFound):
        await house.tasks.delete(id, force=True)
    # Nothing of it stays, so that the same container can be tried again.
    with pytest.raises(WherryError) as again:
        await house.tasks.create(id, house.mounts)
        await house.tasks.start(id)
    assert type(again.value) in (Unknown, NotFound, FailedPrecondition)
    with contextlib.suppress(NotFound):
        await house.tasks.delete(id, force=True)


async def test_runtimes_by_name(house: House) -> None:
    id = await house.container("/bin/true")
    with pytest.raises(InvalidArgument, match="nosuch"):
        await house.tasks.create(id, house.mounts, runtime="nosuch")
    with pytest.raises(PermissionDenied, match="/bin/sh"):
        await house.tasks.create(id, house.mounts, runtime="/bin/sh")
    await house.tasks.create(id, house.mounts, runtime="default")
    await house.tasks.delete(id)


async def test_exec(house: House) -> None:
    id = await house.running("/bin/sleep", "1000")
    await house.tasks.exec(id, "one", exec_of("sh", "-c", "exit 5"))
    with pytest.raises(AlreadyExists, match="one"):
        await house.tasks.exec(id, "one", exec_of("true"))
    assert (await house.tasks.get(id, "one")).status == "created"
    with pytest.raises(FailedPrecondition):
        await house.tasks.kill(id, 9, "one")
    pid = await house.tasks.start(id, "one")
    assert await house.exit(id, "one") == 5
    exit = await house.tasks.delete(id, "one")
    assert (exit.exit_status, exit.pid) == (5, pid)
    with pytest.raises(NotFound):
        await house.tasks.get(id, "one")
    await house.tasks.exec(id, "two", exec_of("sleep", "1000"))
    two = await house.tasks.start(id, "two")
    pids = {p.pid: p.exec_id for p in await house.tasks.pids(id)}
    assert pids[two] == "two" and pids[(await house.tasks.get(id)).pid] == ""
    await house.tasks.kill(id, signal.SIGTERM, "two")
    assert await house.exit(id, "two") == 128 + signal.SIGTERM
    await house.tasks.exec(id, "never", exec_of("true"))
    await house.tasks.delete(id, "never")
    assert (await house.tasks.delete(id, force=True)).exit_status == 137


async def test_pause_and_resume(house: House) -> None:
    id = await house.running("/bin/sleep", "1000")
    await house.tasks.pause(id)
    assert (await house.tasks.get(id)).status == "paused"
    with pytest.raises(FailedPrecondition, match="paused"):
        await house.tasks.pause(id)
    await house.tasks.resume(id)
    assert (await house.tasks.get(id)).status == "running"
    await house.tasks.pause(id)
    assert (await house.tasks.delete(id, force=True)).exit_status == 137


async def test_output_goes_to_files_and_fifos(house: House, tmp_path: Path) -> None:
    out = tmp_path / "out"
    id = await house.running("/bin/echo", "to a file", stdio=Stdio(stdout=f"file://{out}"))
    assert await house.exit(id) == 0
    await house.tasks.delete(id)
    assert out.read_text() == "to a file\n"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    id = await house.running("/bin/echo", "to a fifo", stdio=Stdio(stdout=str(fifo)))
    assert await house.exit(id) == 0
    await house.tasks.delete(id)
    assert os.read(reader, 100) == b"to a fifo\n"
    os.close(reader)


async def test_the_same_key_is_one_task(house: House) -> None:
    id = await house.container("/bin/sleep", "1000")
    with context.use(key="k1"):
        first = await house.tasks.create(id, house.mounts)
        assert await house.tasks.create(id, house.mounts) == first
    with context.use(key="k2"):
        await house.tasks.start(id)
        await house.tasks.start(id)
    await house.tasks.delete(id, force=True)


async def test_twenty_at_once(house: House) -> None:
    async def life(number: int) -> int:
        id = await house.running(*SH, f"exit {number}")
        code = await house.exit(id)
        await house.tasks.delete(id)
        return code

    assert await asyncio.gather(*(life(n) for n in range(20))) == list(range(20))


async def test_walk(house: House) -> None:
    ids = sorted([await house.created("/bin/true") for _ in range(3)])
    page = await house.tasks.walk(limit=2)
    assert [p.container_id for p in page.items] == ids[:2] and page.next == ids[1]
    page = await house.tasks.walk(after=page.next)
    assert [p.container_id for p in page.items] == ids[2:] and page.next == ""
    assert (await house.bus.proxy(Tasks, namespace="other").walk()).items == []


async def test_what_a_restart_finds(house: House) -> None:
    """Running ones are adopted, ends of meanwhile reported once, and an exec survives too."""
    stays, ends, waits = await house.running("/bin/sleep", "1000"), "", ""
    ends = await house.running(*SH, f"{gate()}; exit 9")
    waits = await house.created("/bin/sleep", "1000")
    await house.tasks.exec(stays, "e", exec_of("sleep", "1000"))
    await house.tasks.start(stays, "e")
    before = {id: (await house.tasks.get(id)).pid for id in (stays, ends, waits)}
    async with await house.bus.subscribe(namespace="default", topic="/tasks/exit") as exits:
        await house.stop_tasks()
        house.open_gate()
        async with asyncio.timeout(PATIENCE):
            while not gone(before[ends]):
                await asyncio.sleep(0.02)
        await house.start_tasks()
        assert await house.exit(ends) == 9
        assert (await house.tasks.get(stays)).pid == before[stays]
        assert (await house.tasks.get(stays, "e")).status == "running"
        await house.tasks.start(waits)
        assert (await house.tasks.get(waits)).status == "running"
        await house.tasks.kill(stays, 9, "e")
        assert await house.exit(stays, "e") == 137
        seen = []
        async with asyncio.timeout(PATIENCE):
            async for event in exits:
                seen.append((event.event["container_id"], event.event["id"], event.event["exit_status"]))
                if len(seen) == 2:
                    break
        assert seen == [(ends, ends, 9), (stays, "e", 137)]
    for id in (stays, ends, waits):
        await house.tasks.delete(id, force=True)


async def test_a_lost_connection_is_made_again(house: House) -> None:
    """Only the connection to a living monitor is gone: its container goes on, and its end is told."""
    id = await house.running("/bin/sleep", "1000")
    pid = (await house.tasks.get(id)).pid
    shim = house.supervisor.task("default", id).shim
    line: Any = getattr(shim, "channel", None) or shim._client  # type: ignore[attr-defined]
    line._writer.transport.abort()
    while house.supervisor.task("default", id).shim is shim:
        await asyncio.sleep(0.01)
    assert os.path.exists(f"/proc/{pid}")
    await house.tasks.kill(id, signal.SIGTERM)
    await house.tasks.kill(id, signal.SIGKILL)
    assert await house.exit(id) == 137
    await house.tasks.delete(id)


async def test_a_killed_monitor(house: House) -> None:
    """Its container is killed and reported, an exec before the init, and deleting works."""
    id = await house.running("/bin/sleep", "1000")
    await house.tasks.exec(id, "e", exec_of("sleep", "1000"))
    await house.tasks.start(id, "e")
    pid = (await house.tasks.get(id)).pid
    async with await house.bus.subscribe(namespace="default", topic="/tasks/exit") as exits:
        os.kill(parent_of(pid), signal.SIGKILL)
        assert await house.exit(id) == 137
        ended = [(await anext(exits)).event for _ in range(2)]
    assert [(e["id"], e["exit_status"], e.get("shim_died")) for e in ended] == [("e", 137, True), (id, 137, True)]
    assert gone(pid)
    await house.tasks.delete(id)


async def test_a_bundle_that_nobody_was_told_of_goes(house: House) -> None:
    """Killed between the container's creation and its record: it is gone at the next start."""
    id = await house.created("/bin/sleep", "1000")
    pid = (await house.tasks.get(id)).pid
    await house.stop_tasks()
    database = await Database.open(house.root / "task.db", metadata.MIGRATIONS)
    await database.write(lambda tx: metadata.delete_task(tx, "default", id))
    await database.close()
    await house.start_tasks()
    with pytest.raises(NotFound):
        await house.tasks.get(id)
    assert gone(pid)
    await house.tasks.create(id, house.mounts)
    await house.tasks.delete(id, force=True)
