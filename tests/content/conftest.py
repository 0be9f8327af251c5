"""Fixtures of the content service's own tests: replicas on one root and one bus in memory, and doomed processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from contentd import Replica
from wherry_shared.bus import Bus
from wherry_shared.memory import MemoryTransport

Start = Callable[..., Any]


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
