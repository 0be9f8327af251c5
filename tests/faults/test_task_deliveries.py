"""Every mutation of the runtime half, delivered three times at once and again to the next process: one effect."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from housebus import PATIENCE
from wherry.client import Client
from wherry.spec import Options, User, make, process
from wherry_shared import context
from wherry_shared.api.container import Container, Runtime
from wherry_shared.api.task import CheckpointOptions, Stdio, Tasks
from wherry_shared.values import Mount

from .half import Half
from .test_deliveries import deliver

SERVICES = ("events", "container", "snapshot", "task")
ID = "one"
SCRIPT = (
    "trap 'echo got >> /tmp/got' USR1; trap 'echo all >> /tmp/got' USR2; echo ready >> /tmp/got; "
    "while true; do read line && echo $line >> /tmp/got || sleep 0.1; done"
)
# Until the init is told to end: each step, and what comes of it.
SLEEP = process(["/bin/sleep", "1000"], env=["PATH=/bin"], cwd="/", user=User(), terminal=False)
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("create", {"container_id": ID}),
    ("start", {"container_id": ID}),
    ("kill", {"container_id": ID, "signal": signal.SIGUSR2, "all": True}),
    ("exec", {"container_id": ID, "exec_id": "e", "process": SLEEP}),
    ("start", {"container_id": ID, "exec_id": "e"}),
    ("exec", {"container_id": ID, "exec_id": "k", "process": SLEEP}),
    ("start", {"container_id": ID, "exec_id": "k"}),
    ("kill", {"container_id": ID, "exec_id": "k", "signal": signal.SIGKILL}),
    ("kill", {"container_id": ID, "signal": signal.SIGUSR1}),
    ("input", {"container_id": ID, "writer": "w", "offset": 0, "data": b"said\n"}),
    ("resize", {"container_id": ID, "width": 80, "height": 24}),
    ("close_stdin", {"container_id": ID}),
    ("update", {"container_id": ID, "resources": {"pids": {"limit": 50}}}),
    ("update", {"container_id": ID, "resources": {"pids": {"limit": 60}}}),
    ("pause", {"container_id": ID}),
    ("resume", {"container_id": ID}),
    ("checkpoint", {"container_id": ID, "options": CheckpointOptions(image="/no/such/place", exit=True)}),
]  # fmt: skip
END: list[tuple[str, dict[str, Any]]] = [
    ("delete", {"container_id": ID, "exec_id": "e", "force": True}),
    ("delete", {"container_id": ID, "exec_id": "k"}),
    ("delete", {"container_id": ID, "force": True}),
]
# A checkpoint that failed may be tried again; the others are as well done twice, or have their own count.
NOT_BY_THE_NEXT = {"checkpoint", "resize", "close_stdin", "input"}


@pytest.fixture
def half(tmp_path: Path) -> Iterator[Half]:
    with Half(tmp_path, services=SERVICES) as made:
        yield made
        if "task" not in made.processes:
            made.start("task")
        made.kill("task", signal.SIGINT)  # with its containers


def test_every_mutation_of_the_runtime_half_is_here() -> None:
    mutating = {name for name, endpoint in Tasks.endpoints.items() if endpoint.mutates}
    assert {name for name, _ in STEPS + END} == mutating


async def test_three_deliveries_and_one_to_the_next_process(half: Half, tmp_path: Path) -> None:
    root, shared = tmp_path / "rootfs", tmp_path / "shared"
    for folder in (root / "bin", root / "proc", root / "dev", root / "sys", root / "tmp", shared):
        folder.mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for name in ("sh", "sleep"):
        (root / "bin" / name).symlink_to("busybox")
    bind = {"destination": "/tmp", "type": "bind", "source": str(shared), "options": ["rbind", "rw"]}
    spec = make(ID, None, Options(args=["/bin/sh", "-c", SCRIPT], mounts=[bind]), User())
    given = {
        "mounts": [Mount(type="bind", source=str(root), options=["rbind", "ro"])],
        "stdio": Stdio(stdin="bus://", stdout="bus://"),
    }
    async with half.client() as client:
        with context.use(timeout=30):
            await client.events.stream()
            await client.tasks.walk()
            await client.containers.create(Container(id=ID, runtime=Runtime(name="default"), spec=spec))
        first = await _all(client, "a", [(n, {**a, **(given if n == "create" else {})}) for n, a in STEPS], shared)
        await _again(half, client, first)
        assert [p.exec_id for p in await client.tasks.pids(ID)].count("e") == 1
        assert (await client.tasks.get(ID)).status == "running"
        assert _pids_max((await client.tasks.get(ID)).pid) == "60"
        assert Counter((shared / "got").read_text().split()) == Counter(["ready", "all", "got", "said"])
        # What was killed is remembered beside the container, and goes with it.
        first = [done for done in first if done[1] != "kill"] + await _all(client, "b", END, shared)
        await _again(half, client, first)
        assert (await client.tasks.walk()).items == []
        async with asyncio.timeout(PATIENCE):
            while half.untold():  # events leave after the answer
                await asyncio.sleep(0.02)
        window = await client.events.replay()
    said = Counter(json.dumps([e.topic, e.event], sort_keys=True) for e in window.events)
    assert max(said.values()) == 1, said
    topics = Counter(e.topic.removeprefix("/tasks/") for e in window.events if e.topic.startswith("/tasks/"))
    assert topics == {
        "create": 1, "start": 1, "exec-added": 2, "exec-started": 2, "paused": 1, "resumed": 1, "exit": 3, "delete": 3,
    }  # fmt: skip


Done = tuple[str, str, dict[str, Any], tuple[bytes, str]]


async def _all(client: Client, prefix: str, steps: list[tuple[str, dict[str, Any]]], shared: Path) -> list[Done]:
    """Each step three times at once, with one key."""
    first: list[Done] = []
    for number, (name, arguments) in enumerate(steps):
        if name == "kill":
            await _until(shared, "ready")
        key = f"{prefix}{number}"
        answers = await deliver(client, f"task.{name}", arguments, key, "", 3)
        assert len(set(answers)) == 1, f"{name} answered in several ways: {answers}"
        assert (answers[0][1] == "") is (name != "checkpoint"), (name, answers)
        if name == "input":
            await _until(shared, "said")
        first.append((key, name, arguments, answers[0]))
    return first


async def _again(half: Half, client: Client, first: list[Done]) -> None:
    """Another process of the service, and everything once more."""
    half.kill("task")
    half.start("task")
    with context.use(timeout=30):
        await client.tasks.walk()
    for key, name, arguments, answer in first:
        if name not in NOT_BY_THE_NEXT:
            assert await deliver(client, f"task.{name}", arguments, key, "", 1) == [answer], name


async def _until(shared: Path, word: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while not (shared / "got").exists() or word not in (shared / "got").read_text():
            await asyncio.sleep(0.02)


def _pids_max(pid: int) -> str:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for top in ("/sys/fs/cgroup/pids", "/sys/fs/cgroup"):
            if controllers in ("pids", "") and (file := Path(f"{top}{path}/pids.max")).exists():
                return file.read_text().strip()
    raise AssertionError("no cgroup counts its processes")
