"""What runs outlives what is killed around it, and every end is told once, with its real status and time."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import wherry
from housebus import PATIENCE
from node import Node, eventually
from wherry.task import Task
from wherry_shared import context
from wherry_shared.api.events import Envelope
from wherry_shared.errors import DeadlineExceeded, Unavailable, WherryError

RUNNING, ENDING = 50, 10
GATED = "while [ ! -e /gate/open ]; do sleep 0.1; done; exit {}"


async def begin(client: wherry.Client, image: wherry.Image, id: str, script: str) -> Task:
    task = await (await client.new_container(id, image, args=["sh", "-c", script])).new_task()
    await task.start()
    return task


class CutShort:
    """A contract whose first create takes effect, or does not, while its caller is already told to stop."""

    def __init__(self, real: Any, *, arrives: bool) -> None:
        self._real, self._arrives, self._cut = real, arrives, False

    async def create(self, *given: Any) -> Any:
        if self._cut:
            return await self._real.create(*given)
        self._cut = True
        if self._arrives:
            await self._real.create(*given)
        raise asyncio.CancelledError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_container_whose_maker_was_stopped(
    node: Node, busybox_ref: str, namespace: str, arrives: bool
) -> None:  # fmt: skip
    """Neither a record without files nor files without a record; and what another has is left alone."""
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        image = await client.pull(busybox_ref, unpack=True)
        real = client.containers
        client.containers = cast(Any, CutShort(real, arrives=arrives))
        with pytest.raises(asyncio.CancelledError):
            await client.new_container("stopped", image, args=["true"])
        assert node.json("ps", "-a", "-n", namespace) == []
        assert node.json("snapshot", "ls", "-n", namespace, "kind==active") == []
        client.containers = real
        async with client.new_container("kept", image, args=["true"]):
            client.containers = cast(Any, CutShort(real, arrives=False))
            with pytest.raises(asyncio.CancelledError):
                await client.new_container("kept", image, args=["true"], snapshot="another")
            assert [row["id"] for row in node.json("ps", "-a", "-n", namespace)] == ["kept"]
            client.containers = real


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_task_whose_maker_was_stopped(node: Node, busybox_ref: str, namespace: str, arrives: bool) -> None:
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        image = await client.pull(busybox_ref, unpack=True)
        real = client.tasks
        with pytest.raises(asyncio.CancelledError):
            async with client.new_container("stopped", image, args=["true"]) as container:
                client.tasks = cast(Any, CutShort(real, arrives=arrives))
                await container.new_task(stdio=wherry.Stdio.output())
        assert node.json("ps", "-a", "-n", namespace) == []
        assert node.json("snapshot", "ls", "-n", namespace, "kind==active") == []
        client.tasks = real
        async with client.new_container("kept", image, args=["sleep", "1000"]) as container:
            task = await container.new_task()
            client.tasks = cast(Any, CutShort(real, arrives=False))
            with pytest.raises(asyncio.CancelledError):
                await container.new_task()
            client.tasks = real
            assert (await task.state()).status == "created"
            await task.delete(force=True)


async def end(client: wherry.Client, tasks: dict[str, Task]) -> None:
    async def one(id: str, task: Task) -> None:
        await task.delete(force=True)
        await (await client.container(id)).delete(snapshot=True)

    await asyncio.gather(*(one(id, task) for id, task in tasks.items()))


async def exits(client: wherry.Client, count: int) -> list[Envelope]:
    """So many at least, and one that comes too often has a second to come."""
    async with asyncio.timeout(PATIENCE):
        while len((await client.events.replay(filters=['topic=="/tasks/exit"'])).events) < count:
            await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)
    return list((await client.events.replay(filters=['topic=="/tasks/exit"'])).events)


def told(events: list[Envelope]) -> Counter[tuple[str, int]]:
    return Counter((str(e.event["container_id"]), int(e.event["exit_status"])) for e in events)


async def test_ends_while_the_task_service_is_dead(node: Node, busybox_ref: str, namespace: str) -> None:
    """threats 7: those that run go on and write on, and the others have ended as they did."""
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        image = await client.pull(busybox_ref, unpack=True)
        ids = [f"c{number}" for number in range(RUNNING)]
        scripts = [GATED.format(20 + n) if n < ENDING else "while true; do sleep 1; done" for n in range(RUNNING)]
        tasks: dict[str, Task] = {}
        for start in range(0, RUNNING, 5):  # not all at once: the node shares two cores with other tests
            some = range(start, start + 5)
            made = await asyncio.gather(*(begin(client, image, ids[n], scripts[n]) for n in some))
            tasks |= {ids[n]: task for n, task in zip(some, made, strict=True)}
        talk = "i=0; while true; do echo line $i; i=$((i+1)); sleep 0.05; done"
        node.run("run", "-n", namespace, "-d", "--name", "talks", busybox_ref, "sh", "-c", talk)
        pids = {id: (await task.state()).pid for id, task in tasks.items()}
        ending, staying = ids[:ENDING], ids[ENDING:]
        with node.standing_still("task", signal.SIGKILL) as old:  # no end is told to it any more
            for id in ending:
                _open_gate(pids[id])
            eventually(lambda: not any(_alive(pids[id]) for id in ending), "they do not end")
        assert [(await tasks[id].wait()).code for id in ending] == [20 + n for n in range(ENDING)]
        node.wait_restarted("task", old)
        states = {id: await tasks[id].state() for id in staying}
        assert {(state.status, state.pid) for state in states.values()} == {("running", pids[id]) for id in staying}
        assert told(await exits(client, ENDING)) == Counter({(f"c{n}", 20 + n): 1 for n in range(ENDING)})
        before = _lines(node, namespace)
        eventually(lambda: len(_lines(node, namespace)) > len(before), "nothing more is logged")
        assert before == [f"line {n}" for n in range(len(before))]
        node.run("rm", "-n", namespace, "-f", "talks")
        await end(client, tasks)


def _lines(node: Node, namespace: str) -> list[str]:
    return node.run("logs", "-n", namespace, "talks").stdout.splitlines()


async def test_what_is_asked_while_the_bus_is_down(node: Node, busybox_ref: str, namespace: str) -> None:
    """threats 10: it fails at once, is never done later, and what runs does not notice."""
    async with wherry.connect(state=str(node.state), namespace=namespace, direct=False) as client:
        image = await client.pull(busybox_ref, unpack=True)
        tasks = {"steady": await begin(client, image, "steady", "while true; do sleep 1; done")}
        before = await tasks["steady"].state()
        os.kill(node.pid, signal.SIGSTOP)  # so that nobody starts another nats-server
        try:
            os.kill(node.pids()["nats-server"], signal.SIGKILL)
            for _ in range(5):
                for call in (client.tasks.pause("steady"), client.tasks.kill("steady", signal.SIGKILL)):
                    with context.use(timeout=0.4), pytest.raises((Unavailable, DeadlineExceeded)):
                        await call
        finally:
            os.kill(node.pid, signal.SIGCONT)
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    assert await tasks["steady"].state() == before
                    break
                except WherryError:
                    await asyncio.sleep(0.1)
        await asyncio.sleep(0.6)  # longer than the refused calls' deadlines, were one kept somewhere
        assert await tasks["steady"].state() == before
        await end(client, tasks)


async def test_a_node_that_is_killed_altogether(busybox_ref: str, tmp_path: Path) -> None:
    """Supervisor, bus, services, zygote and monitors at once: the next start finds, tells and cleans everything."""
    with Node(tmp_path) as node:
        node.run("run", "-d", "--name", "one", busybox_ref, "sleep", "1000")
        node.run("run", "-d", "--name", "two", "--runtime", "runc", busybox_ref, "sleep", "1000")
        pids = {row["id"]: row["pid"] for row in node.json("ps")}
        groups = [group for pid in pids.values() for group in _cgroups(pid)]
        assert groups and all(group.exists() for group in groups)
        services = list(node.pids().values())
        os.kill(node.pid, signal.SIGSTOP)
        for pid in [*services, *_of(node)]:
            _kill(pid)
        node.stop(signal.SIGKILL)
    with node:
        rows = {row["id"]: row["status"] for row in node.json("ps", "-a")}
        assert rows == {"one": "stopped (137)", "two": "stopped (137)"}
        assert not any(_alive(pid) for pid in pids.values())
        assert node.mounts() == []

        def counted() -> list[int]:
            said = node.run("events", "--since", "5m", "--no-follow", "--filter", 'topic=="/tasks/exit"').stdout
            return [said.count(f'"container_id": "{id}"') for id in ("one", "two")]

        eventually(lambda: all(counted()), "the ends are not told")
        assert counted() == [1, 1]
        node.run("start", "one")
        assert node.run("exec", "one", "echo", "again").stdout == "again\n"
        node.run("rm", "-f", "one", "two")
        assert not list((node.state / "task/tasks").glob("*/*"))
        assert not list((node.state / "task/runtimes").glob("*/*/*"))
        assert not [str(group) for group in groups if group.exists()]


def _cgroups(pid: int) -> list[Path]:
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    tops = [top for top in Path("/sys/fs/cgroup").iterdir() if top.is_dir()] + [Path("/sys/fs/cgroup")]
    found = {top / path.lstrip("/") for _, _, path in lines if path.startswith("/wherry-") for top in tops}
    return [group for group in sorted(found) if group.exists()]


def _of(node: Node) -> list[int]:
    """What mentions the node's directories in its command line, the zygote and its monitors among them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in (os.getpid(), node.pid):
            try:
                if os.fsencode(node.state) in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # with another one


def _open_gate(pid: int) -> None:
    folder = Path(f"/proc/{pid}/root/gate")
    folder.mkdir()
    (folder / "open").touch()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
