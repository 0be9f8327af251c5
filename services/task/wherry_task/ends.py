"""How processes end: what their shims tell is recorded exactly once, an exec's end before the init's."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from wherry_shared.errors import NotFound, Unavailable, WherryError
from wherry_shared.sqlite import Database, Transaction

from . import metadata
from .backends import Ended, Launcher, Notice
from .metadata import ProcessRow
from .stdio.streams import Streams
from .tasks import Task, time_of

log = logging.getLogger("wherry.task")

SIGKILL = 9


class Ends:
    """Follows the shims of tasks, and cleans up after those that die."""

    def __init__(self, database: Database, launcher: Launcher, streams: Streams) -> None:
        self._database = database
        self._streams = streams
        self._launcher = launcher

    async def follow(self, task: Task) -> None:
        """From here on every end is recorded, also those from before."""
        task.consumer = asyncio.get_running_loop().create_task(self._consume(task))
        await self._watch(task)

    async def _watch(self, task: Task) -> None:
        running = [p.row.exec for p in task.processes.values() if p.row.exec and p.row.pid and not p.ended.is_set()]
        await task.shim.watch(task.notices.put_nowait, lambda: task.notices.put_nowait(None), running)

    async def unfollow(self, task: Task) -> None:
        """Let go of a shim; its container goes on."""
        await task.shim.close()
        if task.consumer is not None and task.consumer is not asyncio.current_task():
            task.consumer.cancel()

    async def _consume(self, task: Task) -> None:
        """One notice after the other, each until it is on record: their order is a promise."""
        while True:
            notice = await task.notices.get()
            while not task.deleting:
                try:
                    await self._handle(task, notice)
                    break
                except WherryError as e:
                    log.error("what a monitor told of %s could not be recorded: %s", task.row.container, e)
                    await asyncio.sleep(0.5)

    async def _handle(self, task: Task, notice: Notice | None) -> None:
        if notice is None:
            await self._disconnected(task)
            return
        async with task.lock:
            await self._take(task, notice)

    async def _take(self, task: Task, notice: Notice) -> None:
        """Record one end, or one lack of memory; what is on record already is told no second time."""
        namespace, container = task.key
        if not isinstance(notice, Ended):
            await self._database.write(
                lambda tx: tx.publish("/tasks/oom", {"container_id": container}, namespace=namespace)
            )
            return
        process = task.processes.get(notice.exec_id)
        if process is None or process.ended.is_set():
            return
        row = replace(
            process.row, pid=notice.pid or process.row.pid, status="stopped", exit_status=notice.exit_status,
            exited_ns=notice.exited_ns,
        )  # fmt: skip
        event: dict[str, Any] = {
            "container_id": container, "id": notice.exec_id or container, "pid": row.pid,
            "exit_status": notice.exit_status, "exited_at": time_of(notice.exited_ns).isoformat(),
        }  # fmt: skip
        event |= {flag: True for flag in ("oom", "shim_died") if getattr(notice, flag)}

        def record(tx: Transaction) -> None:
            metadata.put_process(tx, namespace, container, row)
            tx.publish("/tasks/exit", event, namespace=namespace)

        # An end cannot be refused for want of room: it may use what is kept for removals.
        await self._database.write(record, frees=True)
        process.row = row
        process.ended.set()
        self._streams.of((namespace, container, notice.exec_id)).ended()

    async def _disconnected(self, task: Task) -> None:
        """The connection to a monitor ended: follow it again if it lives, else clean up and report the ends."""
        if task.deleting:
            return
        alive = await self._launcher.adopt(task.bundle)
        if alive is not None:
            task.shim = alive
            await self._watch(task)
            return
        async with task.lock:
            if task.deleting:
                return
            log.warning("the monitor of %s died; its container is killed", task.row.container)
            found = {e.exec_id: e for e in await self._launcher.clean(task.bundle)}
            await self.lost(task, found)

    async def give_up(self, task: Task) -> None:
        """Kill a shim that does not answer, and its container with it."""
        async with task.lock:
            if task.process("").ended.is_set():
                return
            await task.shim.close()
            found = {e.exec_id: e for e in await self._launcher.clean(task.bundle, kill=True)}
            await self.lost(task, found)

    async def take_away(self, task: Task) -> None:
        """Have removed what is left of a container that is deleted, and its shim end."""
        try:
            await task.shim.delete("", force=True)
        except (NotFound, Unavailable):
            if task.bundle.path.is_dir():
                await self._launcher.clean(task.bundle, kill=True)

    async def retry(self, task: Task) -> None:
        """A shim that is there was silent when this service started: ask again until it speaks or is gone."""
        pause = 0.5
        while not task.deleting and not task.process("").ended.is_set():
            await asyncio.sleep(pause)
            pause = min(pause * 2, 30.0)
            try:
                alive = await self._launcher.adopt(task.bundle)
                if alive is None:
                    await self._disconnected(task)
                    return
                task.shim = alive
                await self.reconcile(task)
                await self.follow(task)
            except WherryError as e:
                log.warning("the monitor of %s does not answer: %s", task.row.container, e)
            else:
                return

    async def reconcile(self, task: Task) -> None:
        """A start that took effect, but whose record was lost with its service, is recorded now.

        A pause or a resume of which that is so leaves it pausing: who asked asks again, or somebody else decides.
        """
        namespace, container = task.key
        seen = await task.shim.state([p.row.exec for p in task.processes.values() if p.row.exec and not p.row.pid])
        init = task.process("")
        if init.row.status == "created" and seen.running:
            init.row = replace(init.row, pid=seen.pid or init.row.pid, status="running")
            init.untold = True

            def record(tx: Transaction) -> None:
                metadata.put_process(tx, namespace, container, init.row)
                tx.publish("/tasks/start", {"container_id": container, "pid": init.row.pid}, namespace=namespace)

            await self._database.write(record)
        elif init.row.status in ("running", "paused") and seen.paused != (init.row.status == "paused"):
            init.row = replace(init.row, status="pausing")
        for exec_id, pid in seen.execs.items():
            process = task.processes.get(exec_id)
            if process is not None and not process.row.pid:
                process.row = replace(process.row, pid=pid, status="running")
                process.untold = True
                event = {"container_id": container, "exec_id": exec_id, "pid": pid}
                await self._database.write(partial(_record_exec, namespace, container, process.row, event))

    async def lost(self, task: Task, found: dict[str, Ended]) -> None:
        """Record the ends of a task whose shim is gone; what nobody reaped counts as killed."""
        for exec_id, process in sorted(task.processes.items(), key=lambda item: (item[0] == "", item[0])):
            if process.ended.is_set() or not process.row.pid:
                continue
            unknown = Ended(exec_id, process.row.pid, 128 + SIGKILL, time.time_ns(), shim_died=True)
            await self._take(task, found.get(exec_id, unknown))


def _record_exec(namespace: str, container: str, row: ProcessRow, event: dict[str, Any], tx: Transaction) -> None:
    metadata.put_process(tx, namespace, container, row)
    tx.publish("/tasks/exec-started", event, namespace=namespace)
