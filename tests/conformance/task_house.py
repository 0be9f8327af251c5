"""A container service and a task service on one bus, over a real runtime, for the suites of tasks."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rebuilt import event_stream
from wherry.spec import Options, User, make, process
from wherry_container import metadata as container_metadata
from wherry_container.catalog import Catalog
from wherry_container.service import ContainerService
from wherry_shared.api.container import Container, Containers, Runtime
from wherry_shared.api.content import Content
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.api.task import Stdio, Tasks
from wherry_shared.bus import Bus
from wherry_shared.errors import Unavailable
from wherry_shared.outbox import Outbox
from wherry_shared.sqlite import Database
from wherry_shared.values import Mount
from wherry_task import metadata, runtimes
from wherry_task.backends import Launchers
from wherry_task.backends.oci import OciLauncher
from wherry_task.backends.shim import ShimLauncher
from wherry_task.bundles import Bundles
from wherry_task.checkpoints import Checkpoints
from wherry_task.lingering import Lingering
from wherry_task.processes import Processes
from wherry_task.service import TaskService
from wherry_task.stdio.streams import Streams
from wherry_task.supervisor import Supervisor

BUSYBOX = Path("/bin/busybox")
SH = ["/bin/sh", "-c"]


class House:
    """A container and a task service on one bus; the task service can be stopped and built again."""

    def __init__(self, bus: Bus, root: Path, runtime: str) -> None:
        self.bus, self.root, self.runtime = bus, root, runtime
        self.state = root / "state"
        self.tasks = bus.proxy(Tasks, namespace="default")
        self.containers = bus.proxy(Containers, namespace="default")
        self.rootfs = root / "rootfs"
        self.allowed: list[str] = []

    async def start(self) -> None:
        for path in (self.state, self.rootfs / "bin", self.rootfs / "proc", self.rootfs / "dev", self.rootfs / "sys"):
            path.mkdir(parents=True, mode=0o755)
        self.state.chmod(0o700)
        shutil.copy(BUSYBOX, self.rootfs / "bin/busybox")
        for name in ("sh", "sleep", "true", "cat", "echo"):
            (self.rootfs / "bin" / name).symlink_to("busybox")
        await event_stream(self.bus)
        self.catalog_db = await Database.open(self.root / "container.db", container_metadata.MIGRATIONS)
        await self.bus.serve(ContainerService(Catalog(container_metadata.table(self.catalog_db))))
        await self.start_tasks()

    async def start_tasks(self) -> None:
        self.database = await Database.open(self.root / "task.db", metadata.MIGRATIONS)
        self.outbox = Outbox(self.database, self.bus)
        self.outbox.start()
        self.oci = OciLauncher(self.state)
        launcher = Launchers(self.oci, ShimLauncher(self.state))
        self.supervisor = Supervisor(self.database, launcher, Bundles(self.state), Streams(self.root / "logs"))
        await self.supervisor.recover()
        checkpoints = Checkpoints(self.root / "checkpoints", self.bus.proxy(Content))
        await asyncio.to_thread(checkpoints.sweep, self.supervisor.waits)
        self.lingering = Lingering(self.supervisor)
        self.lingering.recover()
        self.service = TaskService(
            self.supervisor, self.bus.proxy(Containers), self.bus.proxy(Snapshots), self.state, checkpoints,
            Processes(self.bus.proxy(Content)), self.allowed, lingering=self.lingering,
        )  # fmt: skip
        self.server = await self.bus.serve(self.service)

    async def stop_tasks(self, *, everything: bool = False) -> None:
        await self.server.drain(2.0)
        await self.lingering.stop()
        await self.supervisor.stop(everything=everything)
        await self.outbox.stop()
        await self.database.close()

    async def stop(self) -> None:
        await self.stop_tasks(everything=True)
        await self.catalog_db.close()

    async def container(self, *args: str, **options: Any) -> str:
        id = f"c-{secrets.token_hex(4)}"
        spec = make(id, None, Options(args=args), User()) | options
        record = Container(id=id, runtime=Runtime(name=self.runtime), spec=spec)
        await self.containers.create(record)
        return id

    async def pause_unanswered(self, id: str, hold: str = "") -> None:
        """A pause that takes effect, and of which nobody hears."""
        shim = self.supervisor.task("default", id).shim

        async def late() -> None:
            await type(shim).pause(shim)
            raise Unavailable("it does not answer")

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Unavailable):
            patch.setattr(shim, "pause", late)
            await self.supervisor.pause("default", id, hold)

    @property
    def mounts(self) -> list[Mount]:
        return [Mount(type="bind", source=str(self.rootfs), options=["rbind", "ro"])]

    def open_gate(self, number: int = 0) -> None:
        """Let go on whoever waits at that `gate`."""
        (self.rootfs / f"gate{number}").touch()

    async def created(self, *args: str, stdio: Stdio | None = None) -> str:
        id = await self.container(*args)
        await self.tasks.create(id, self.mounts, stdio or Stdio())
        return id

    async def running(self, *args: str, stdio: Stdio | None = None) -> str:
        id = await self.created(*args, stdio=stdio)
        await self.tasks.start(id)
        return id

    async def changed(self, id: str, **linux: Any) -> None:
        """Change what a container's specification says of Linux, by key."""
        record = await self.containers.get(id)
        assert record.spec is not None
        spec = {**record.spec, "linux": {**record.spec["linux"], **linux}}
        await self.containers.update(record.model_copy(update={"spec": spec}), mask=["spec"])

    def leftovers(self, id: str) -> list[str]:
        """What the node still has of a task: bundle, cgroups, the runtime's state, mounts."""
        places = [self.state / "tasks/default" / id, *(self.state / "runtimes").glob(f"*/default/{id}")]
        places += [Path(f"{top}/{Bundles(self.state).cgroup}/default/{id}") for top in cgroup_tops()]
        mounted = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"/default/{id}/" in line]
        return [str(path) for path in places if path.exists()] + mounted

    async def exit(self, id: str, exec_id: str = "") -> int:
        while (found := await self.tasks.wait(id, exec_id)) is None:
            pass
        return found.exit_status


SHIM = "io.containerd.runc.v2"
RUNTIMES = [name for name in runtimes.installed() if name in ("crun", "runc", SHIM)]


@asynccontextmanager
async def house_of(bus: Bus, root: Path, runtime: str) -> AsyncIterator[House]:
    """A house that leaves no mount behind."""
    made = House(bus, root, runtime)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
    assert str(root) not in Path("/proc/self/mountinfo").read_text()


def gate(number: int = 0) -> str:
    """What a container's shell waits with, for `open_gate`."""
    return f"until [ -e /gate{number} ]; do sleep 0.02; done"


def exec_of(*args: str, terminal: bool = False) -> dict[str, Any]:
    """An OCI process."""
    return process(["/bin/" + args[0], *args[1:]], env=["PATH=/bin"], cwd="/", user=User(), terminal=terminal)


def cgroup_tops() -> list[Path]:
    """Where each cgroup hierarchy is mounted."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(words[1]) for words in lines if words[2].startswith("cgroup")]


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def parent_of(pid: int) -> int:
    """The monitor: a container's init is its child."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
