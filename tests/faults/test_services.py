"""Kill or stop each service while a container runs: it lives on, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
import wherry
from housebus import PATIENCE
from images import Registry, redis
from node import SERVICES, Node, eventually
from wherry_shared.errors import DeadlineExceeded, Unavailable, WherryError


@pytest.fixture(scope="module")
def redis_ref(registry: Registry) -> str:
    return registry.push(redis(), "library/redis", "7")


@pytest.fixture(scope="module")
def running(node: Node, busybox_ref: str) -> int:
    node.run("run", "-d", "--name", "steady", busybox_ref, "sleep", "100000")
    pid: int = node.json("ps")[0]["pid"]
    return pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
@pytest.mark.parametrize("service", SERVICES)
def test_a_container_outlives_each_service(node: Node, running: int, service: str, number: signal.Signals) -> None:
    before = {verb: node.json(verb, *rest) for verb, *rest in (["images"], ["content", "ls"], ["snapshot", "ls"])}
    old = node.kill(service, number)
    # Asked while the service is down: it just takes a little longer.
    assert node.run("exec", "steady", "echo", "alive").stdout == "alive\n"
    node.wait_restarted(service, old)
    (row,) = node.json("ps")
    assert row["pid"] == running and os.path.exists(f"/proc/{running}")
    after = {verb: node.json(verb, *rest) for verb, *rest in (["images"], ["content", "ls"], ["snapshot", "ls"])}
    assert _without_age(after) == _without_age(before)


def _without_age(told: dict[str, list[dict[str, object]]]) -> object:
    return {verb: [{k: v for k, v in row.items() if k != "age"} for row in rows] for verb, rows in told.items()}


@pytest.mark.parametrize("service", ["content", "snapshot", "diff", "image", "lease", "events"])
async def test_kill_during_a_pull(node: Node, redis_ref: str, namespace: str, service: str) -> None:
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:

        def hurt(progress: wherry.Progress) -> None:
            if progress.kind == "layer" and progress.step == "downloading" and not hurt_once:
                hurt_once.append(node.kill(service))

        hurt_once: list[int] = []
        try:
            async with asyncio.timeout(60):
                await client.pull(redis_ref, unpack=True, on_progress=hurt)
        except* (Unavailable, DeadlineExceeded):
            pass
        assert hurt_once
        image = await client.pull(redis_ref, unpack=True)
        container = await client.new_container("check", image, args=["redis-cli", "--version"])
        async with container.new_task() as task:
            await task.start()
            assert (await task.wait()).code == 0
        await container.delete(snapshot=True)
    node.wait_restarted(service, hurt_once[0])


async def test_exits_while_the_task_service_is_down(node: Node, busybox_ref: str, namespace: str) -> None:
    """Every exit is reported once, with its real status."""
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        image = await client.pull(busybox_ref, unpack=True)
        tasks = []
        for number in range(4):
            args = ["sh", "-c", f"sleep 1; exit {10 + number}"]
            container = await client.new_container(f"c{number}", image, args=args)
            task = await container.new_task()
            await task.start()
            tasks.append(task)
        node.kill("task")
        codes = [(await task.wait()).code for task in tasks]
        assert codes == [10, 11, 12, 13]
        exits: list[str] = []

        async def read() -> bool:
            window = await client.events.replay(filters=['topic=="/tasks/exit"'])
            exits[:] = [str(e.event["container_id"]) for e in window.events]
            return len(exits) >= 4

        for _ in range(600):
            if await read():
                break
            await asyncio.sleep(0.1)
        assert sorted(exits) == ["c0", "c1", "c2", "c3"]
        for task in tasks:
            await task.delete()
            await (await client.container(task.container_id)).delete(snapshot=True)


async def test_a_monitor_that_dies_costs_its_own_container_only(
    node: Node, running: int, busybox_ref: str, namespace: str
) -> None:
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        image = await client.pull(busybox_ref, unpack=True)
        container = await client.new_container("victim", image, args=["sleep", "1000"])
        task = await container.new_task()
        pid = await task.start()
        monitor = int(json.loads(_status(pid))["PPid"])
        os.kill(monitor, signal.SIGKILL)
        assert (await task.wait()).code == 137
        async with asyncio.timeout(PATIENCE):  # the event leaves by the outbox, after the answer
            while not (window := await client.events.replay(filters=['topic=="/tasks/exit"'])).events:
                await asyncio.sleep(0.05)
        assert [e.event.get("shim_died") for e in window.events] == [True]
        await task.delete()
        await container.delete(snapshot=True)
        eventually(lambda: not os.path.exists(f"/proc/{pid}"), "the container lives")
    assert os.path.exists(f"/proc/{running}")


def _status(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return json.dumps(dict(line.split(":", 1) for line in lines))


async def test_a_killed_bus(node: Node, running: int, namespace: str) -> None:
    """nats-server dies: containers live on, calls fail at once or succeed, and no command runs late."""
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        os.kill(node.pids()["nats-server"], signal.SIGKILL)
        failed = 0
        for number in range(200):
            try:
                await client.namespaces.create(f"{namespace}-{number}")
                created = number
                break
            except WherryError:
                failed += 1
                await asyncio.sleep(0.05)
        else:
            raise AssertionError("the bus does not come back")
        assert os.path.exists(f"/proc/{running}")
        known = [n.name for n in (await client.namespaces.walk([f"name~=^{namespace}-"])).items]
        # One whose answer got lost with the bus may have taken effect; none that was refused appears afterwards.
        assert f"{namespace}-{created}" in known
        await asyncio.sleep(1.0)
        assert [n.name for n in (await client.namespaces.walk([f"name~=^{namespace}-"])).items] == known
    assert node.run("exec", "steady", "echo", "alive").stdout == "alive\n"
    eventually(lambda: len(node.services()) == 10, "not all services are on the bus again")
