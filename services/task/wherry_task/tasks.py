"""A task and its processes in memory: rows, who waits for their ends, and in which order things happen."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from wherry_shared.api.task import Exit, Process
from wherry_shared.errors import FailedPrecondition, NotFound

from .backends import Bundle, Notice, Shim
from .metadata import ProcessRow, TaskRow

Key = tuple[str, str]


class Running:
    """One process that the supervisor knows: its row, and who waits for its end. untold: it was started, and the
    service died before it could say so; who asks again is answered then. asked: when somebody last wanted to know of it
    (time.monotonic)."""

    def __init__(self, row: ProcessRow) -> None:
        self.row = row
        self.untold = False
        self.asked = 0.0
        self.ended = asyncio.Event()
        if row.exit_status is not None:
            self.ended.set()

    def exit(self) -> Exit:
        """How it ended; call only after `ended`."""
        row = self.row
        if row.exit_status is None or row.exited_at is None:
            raise FailedPrecondition("the process has not ended")
        return Exit(exit_status=row.exit_status, exited_at=row.exited_at, pid=row.pid)


class Task:
    """A task in memory. `lock` orders what changes it; notices are taken one after the other."""

    def __init__(self, row: TaskRow, bundle: Bundle, shim: Shim) -> None:
        self.row = row
        self.bundle = bundle
        self.shim = shim
        self.lock = asyncio.Lock()
        self.processes: dict[str, Running] = {}
        self.notices: asyncio.Queue[Notice | None] = asyncio.Queue()
        self.consumer: asyncio.Task[None] | None = None
        self.deleting = False

    @property
    def key(self) -> Key:
        return self.row.namespace, self.row.container

    def process(self, exec_id: str) -> Running:
        """NotFound when the task has no such process."""
        found = self.processes.get(exec_id)
        if found is None:
            raise NotFound(f"task {self.row.container} has no process {exec_id!r}")
        return found


def describe(container: str, row: ProcessRow) -> Process:
    """A process as the contract tells of it."""
    return Process(
        container_id=container, exec_id=row.exec, pid=row.pid, status=row.status,
        stdio=row.stdio, exit_status=row.exit_status, exited_at=row.exited_at,
    )  # fmt: skip


def time_of(ns: int) -> datetime:
    """A time in nanoseconds since the epoch."""
    return datetime.fromtimestamp(ns / 1e9, UTC)
