"""The task service: running containers over any OCI runtime (containerd's rules)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Protocol

from ..contract import Contract, endpoint
from ..errors import AlreadyExists, FailedPrecondition, NotFound, PermissionDenied, Unknown
from ..values import Identifier, Model, Mount, Page

Status = Literal["created", "running", "stopped", "paused", "pausing"]


class Stdio(Model):
    """Where a process reads and writes: paths of FIFOs, or `file:///path` to append to; "" is /dev/null."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


class Process(Model):
    """A process of a task: its init (exec_id "") or one that exec started. exit_status is 128+n after signal n."""

    container_id: str
    exec_id: str = ""
    pid: int
    status: Status
    stdio: Stdio = Stdio()
    exit_status: int | None = None
    exited_at: datetime | None = None


class ProcessInfo(Model):
    """One pid inside a container; exec_id of the process that exec started, if it is one."""

    pid: int
    exec_id: str = ""


class Exit(Model):
    """How a process ended."""

    exit_status: int
    exited_at: datetime
    pid: int = 0


EVENTS = {
    "/tasks/create": "container_id bundle rootfs io{stdin stdout stderr terminal} checkpoint pid",
    "/tasks/start": "container_id pid",
    "/tasks/exit": "container_id id pid exit_status exited_at [oom] [shim_died]",
    "/tasks/delete": "container_id id pid exit_status exited_at",
    "/tasks/exec-added": "container_id exec_id",
    "/tasks/exec-started": "container_id exec_id pid",
    "/tasks/oom": "container_id",
    "/tasks/paused": "container_id",
    "/tasks/resumed": "container_id",
}


class Tasks(Contract, Protocol, service="task", version="1.0.0", events=EVENTS):
    """The tasks of one namespace: at most one per container."""

    @endpoint(NotFound, AlreadyExists, FailedPrecondition, PermissionDenied, Unknown, mutates=True, timeout=60.0)
    async def create(
        self, container_id: Identifier, mounts: list[Mount] = [], stdio: Stdio = Stdio(), runtime: str = ""
    ) -> int:
        """Make the task of a container from its spec, with `mounts` as its root filesystem; answers the init's pid.

        runtime: instead of the container's own.
        """
        ...

    @endpoint(NotFound, FailedPrecondition, Unknown, mutates=True, timeout=60.0)
    async def start(self, container_id: Identifier, exec_id: str = "") -> int:
        """Start a created task, or a process that exec added; answers its pid."""
        ...

    @endpoint(NotFound, FailedPrecondition, Unknown, mutates=True, timeout=60.0)
    async def delete(self, container_id: Identifier, exec_id: str = "", force: bool = False) -> Exit:
        """Remove a task that is stopped or was never started, or a process of exec; answers how it ended.

        force: kill it first.
        """
        ...

    @endpoint(NotFound)
    async def get(self, container_id: Identifier, exec_id: str = "") -> Process:
        """The state of a task's init, or of a process of exec."""
        ...

    @endpoint()
    async def walk(self, after: str = "", limit: int = 1000) -> Page[Process]:
        """A window of the namespace's tasks, in order of their containers' ids."""
        ...

    @endpoint(NotFound, FailedPrecondition, Unknown, mutates=True)
    async def kill(self, container_id: Identifier, signal: int, exec_id: str = "", all: bool = False) -> None:
        """Send a signal (1..64) to the init, to a process of exec, or to `all` processes of the container.

        NotFound when the process has finished.
        """
        ...

    @endpoint(NotFound, AlreadyExists, FailedPrecondition, PermissionDenied, mutates=True)
    async def exec(
        self, container_id: Identifier, exec_id: Identifier, process: dict[str, Any], stdio: Stdio = Stdio()
    ) -> None:
        """Add a process (an OCI `process`) to a running task; `start` starts it. The terminal flag of `stdio` wins."""
        ...

    @endpoint(NotFound, FailedPrecondition, Unknown, mutates=True)
    async def pause(self, container_id: Identifier) -> None:
        """Freeze every process of a running task."""
        ...

    @endpoint(NotFound, FailedPrecondition, Unknown, mutates=True)
    async def resume(self, container_id: Identifier) -> None:
        """Thaw a paused task."""
        ...

    @endpoint(NotFound, FailedPrecondition)
    async def pids(self, container_id: Identifier) -> list[ProcessInfo]:
        """Every pid inside the container, as the host numbers them."""
        ...

    @endpoint(NotFound, mutates=True)
    async def resize(self, container_id: Identifier, width: int, height: int, exec_id: str = "") -> None:
        """Set the size of a terminal, in characters; without a terminal nothing happens."""
        ...

    @endpoint(NotFound, mutates=True)
    async def close_stdin(self, container_id: Identifier, exec_id: str = "") -> None:
        """Close the writer that keeps the process's stdin open; closing it twice is closing it once."""
        ...

    @endpoint(NotFound, waits=True, timeout=30.0)
    async def wait(self, container_id: Identifier, exec_id: str = "", patience: float = 5.0) -> Exit | None:
        """How a process ended, as soon as it has: None after `patience` (at most 20) seconds. Ask again then."""
        ...
