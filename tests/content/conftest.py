"""Fixtures of the content service's own tests: replicas on one root and one bus in memory, doomed processes, and the
service as it is run, on a nats-server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from contentd import Replica
from natsd import NatsServer
from wherry_shared.bus import Bus, connect, credentials
from wherry_shared.memory import MemoryTransport

Start = Callable[..., Any]
Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    made = Bus(MemoryTransport(), node="n1")
    yield made
    await made.close()


@pytest.fixture
async def start(bus: Bus, tmp_path: Path) -> AsyncIterator[Start]:
    """`await start("one", ...)`: a replica on the test's root, stopped with the test."""
    made: list[Replica] = []

    async def start(instance: str = "one", root: Path | None = None, **options: Any) -> Replica:
        replica = Replica(bus, root or tmp_path / "content", instance, **options)
        made.append(replica)
        await replica.start()
        return replica

    yield start
    for replica in made:
        await replica.stop()


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`doomed(action)`: a process that works on the test's root (doomed.py); killed with the test."""
    made: list[subprocess.Popen[str]] = []
    script = Path(__file__).with_name("doomed.py")

    def run(action: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(tmp_path / "content"), action]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        made.append(process)
        return process

    yield run
    for process in made:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


# ---- the service as it is run


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A nats-server with the users of node n1."""
    credentials.issue(tmp_path / "creds", "n1")
    users = (tmp_path / "creds" / credentials.NATS_USERS).read_text()
    with NatsServer(tmp_path / "nats", config=users, jetstream=True) as started:
        yield started


@pytest.fixture
def spawn(server: NatsServer, tmp_path: Path) -> Iterator[Spawn]:
    """`spawn("one")`: a content service's process as that instance."""
    made: list[subprocess.Popen[bytes]] = []

    def run(instance: str, *settings: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "wherry_content", "--node", "n1", "--nats", server.url, "--instance", instance]
        command += ["--root", str(tmp_path / "root"), "--state", str(tmp_path), "--creds", str(tmp_path / "creds")]
        made.append(subprocess.Popen([*command, *(f"--set={s}" for s in settings)]))
        return made[-1]

    yield run
    for process in made:
        process.kill()
        process.wait()


@pytest.fixture
async def nats_bus(server: NatsServer, tmp_path: Path) -> AsyncIterator[Bus]:
    """The admin's connection to that server."""
    own = credentials.find(tmp_path / "creds", "admin")
    made = await connect([server.url], node="n1", name="test", seed=own.seed, inbox_prefix=own.inbox_prefix)
    yield made
    await made.close()
