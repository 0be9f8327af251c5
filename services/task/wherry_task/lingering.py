"""Processes of exec that nobody may come back for: whoever let them go, or was killed beside them, deletes none.

Each stays for the time that it was asked to be kept after its end, counted from when somebody last asked about it, and
goes then. That is on record with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from wherry_shared import context
from wherry_shared.errors import NotFound, WherryError

from .supervisor import Supervisor
from .tasks import Running, Task

log = logging.getLogger("wherry.task")

# A process is started right after it was added; one that is not within this, or its own time if that is longer, goes.
START_SECONDS = 120.0
RETRY_SECONDS = 60.0


class Lingering:
    """Deletes each such process."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._waiting: set[asyncio.Task[None]] = set()

    def expect(self, namespace: str, container: str, exec_id: str) -> None:
        """The process is on record: see it off when its time has come, if it has one."""
        with suppress(NotFound):
            task = self._supervisor.task(namespace, container)
            process = task.process(exec_id)
            if process.row.kept >= 0:
                waiting = asyncio.get_running_loop().create_task(self._see_off(task, process))
                self._waiting.add(waiting)
                waiting.add_done_callback(self._waiting.discard)

    def recover(self) -> None:
        """Go on with what an earlier service has promised."""
        for namespace, container, exec_id in self._supervisor.execs():
            self.expect(namespace, container, exec_id)

    async def stop(self) -> None:
        """What is not done yet is for the next service."""
        for waiting in self._waiting:
            waiting.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)

    async def _see_off(self, task: Task, process: Running) -> None:
        # Not in the context of the request that added it: neither its deadline nor its key holds here.
        context.enter(context.Context(namespace=task.row.namespace))
        with suppress(TimeoutError):
            async with asyncio.timeout(max(START_SECONDS, process.row.kept)):
                await process.ended.wait()
        if process.row.status != "created":
            await process.ended.wait()
            process.asked = max(process.asked, time.monotonic())
            left = float(process.row.kept)
            while left > 0:
                await asyncio.sleep(left)
                left = process.asked + process.row.kept - time.monotonic()
        while task.processes.get(process.row.exec) is process:
            try:
                await self._supervisor.delete(*task.key, process.row.exec, force=False)
            except NotFound:
                return
            except WherryError as e:
                log.warning("process %s of task %s is not removed yet: %s", process.row.exec, task.row.container, e)
                await asyncio.sleep(RETRY_SECONDS)
