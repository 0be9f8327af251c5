"""The storage half of a node: its services as processes of their own on a nats-server, to be hurt one by one.

No task service, no supervisor: what dies stays dead until the test starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from housebus import NODE, PATIENCE, HouseServer
from node import children, clean_environment, eventually
from wherry.client import Address, Client
from wherry_shared.bus import Bus, discovery

SERVICES = ("events", "namespace", "lease", "content", "snapshot", "diff", "image", "container", "introspection")


class Half:
    """Services on `root`, with their sockets and pipes in `base`."""

    def __init__(self, base: Path, root: Path | None = None, *, services: tuple[str, ...] = SERVICES) -> None:
        self._services = services
        self.root = root or base / "root"
        self.state = base / "state"
        self.house = HouseServer(base / "bus")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.settings: dict[str, tuple[str, ...]] = {}

    def __enter__(self) -> Half:
        self.house.nats.start()
        for service in self._services:
            self.start(service)
        return self

    def __exit__(self, *exc: object) -> None:
        for service in list(self.processes):
            self.kill(service)
        self.house.nats.stop()

    def start(self, service: str) -> None:
        settings = [f"--set={setting}" for setting in self.settings.get(service, ())]
        self.processes[service] = subprocess.Popen(
            [sys.executable, "-m", f"wherry_{service}", "--node", NODE, "--nats", self.house.nats.url, "--root",
             str(self.root), "--state", str(self.state), "--creds", str(self.house.creds), *settings],
            env=clean_environment(), stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def kill(self, service: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End the service's process, and see that it takes its workers along."""
        process = self.processes.pop(service)
        workers = children(process.pid)
        process.send_signal(number)
        process.wait(PATIENCE)
        eventually(lambda: not [w for w in workers if _lives(w)], f"workers of {service} outlive it")

    @contextlib.asynccontextmanager
    async def client(self, namespace: str = "default") -> AsyncIterator[Client]:
        bus = await self.house.connect(direct=self.state)
        await self._begun(bus)
        address = Address(self.house.nats.url, NODE, self.house.creds / "admin.nk", self.state)
        async with Client(bus, namespace, address) as made:
            yield made

    async def _begun(self, bus: Bus) -> None:
        """Until all that were started answer: on a busy machine that takes longer than a call waits."""
        there: set[object] = set()
        async with asyncio.timeout(PATIENCE):
            while not there.issuperset(self.processes):
                answers = await discovery.ask_all(bus.transport, "PING", wait=0.5, expect=len(self.processes))
                there = {answer["name"] for answer in answers}

    def blob(self, digest: str) -> Path:
        return self.root / "content/blobs" / digest.replace(":", "/")

    def untold(self) -> int:
        """How many events of the services are not in the stream yet."""
        found = 0
        for path in self.root.glob("*/metadata.db"):
            with contextlib.closing(sqlite3.connect(path, timeout=30)) as database:
                if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'outbox'").fetchone():
                    found += int(database.execute("SELECT count(*) FROM outbox").fetchone()[0])
        return found

    def extracted(self) -> int:
        """How many names lie in the snapshots of overlay that are not the directories of its own."""
        found = 0
        for folder in (self.root / "snapshot/overlay/snapshots").glob("*/fs"):
            with contextlib.suppress(OSError):
                found += len(os.listdir(folder))
        return found


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
