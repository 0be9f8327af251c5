"""The rules of tasks: which state allows what."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from wherry_shared import context
from wherry_shared.api.task import Exit, Process, ProcessInfo, Stdio
from wherry_shared.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WherryError,
)  # fmt: skip
from wherry_shared.sqlite import Database, Transaction
from wherry_shared.values import Mount, Page

from . import metadata
from .backends import Bundle, Launcher, Shim
from .bundles import Bundles
from .ends import SIGKILL, Ends
from .metadata import ProcessRow, TaskRow
from .recovery import Recovery, boot_id
from .tasks import Key, Running, Task, describe, members, time_of

log = logging.getLogger("wherry.task")

STOP_PARALLEL = 8


class Supervisor:
    """Every task of the node."""

    def __init__(self, database: Database, launcher: Launcher, bundles: Bundles) -> None:
        self._database = database
        self._launcher = launcher
        self._bundles = bundles
        self._tasks: dict[Key, Task] = {}
        self._creating: set[Key] = set()
        self._boot = boot_id()
        self._ends = Ends(database, launcher)
        self._recovery = Recovery(database, launcher, bundles, self._ends)

    # ---- life

    async def create(
        self, namespace: str, container: str, spec: dict[str, Any], binary: str, mounts: list[Mount], stdio: Stdio
    ) -> int:
        """Make the container; it is there and answered only when it is on record."""
        key = (namespace, container)
        if key in self._tasks or key in self._creating:
            raise AlreadyExists(f"task {container} exists")
        self._creating.add(key)
        try:
            path = self._bundles.make(namespace, container, spec, binary)
            bundle = Bundle(path, container, binary, self._bundles.runtime_root(namespace, binary))
            try:
                return await self._create(key, bundle, spec, mounts, stdio)
            except BaseException:
                await asyncio.shield(self._recovery.abandon(bundle))
                raise
        finally:
            self._creating.discard(key)

    async def _create(self, key: Key, bundle: Bundle, spec: dict[str, Any], mounts: list[Mount], stdio: Stdio) -> int:
        namespace, container = key
        shim = await self._launcher.launch(bundle)
        try:
            poststart = bool((spec.get("hooks") or {}).get("poststart"))
            pid = await shim.create(mounts, stdio, has_poststart=poststart)
            row = TaskRow(namespace, container, str(bundle.path), bundle.binary, self._boot)
            task = Task(row, bundle, shim)
            init = Running(ProcessRow("", pid, "created", "", stdio))
            task.processes[""] = init

            def record(tx: Transaction) -> int:
                metadata.put_task(tx, row)
                metadata.put_process(tx, namespace, container, init.row)
                tx.publish("/tasks/create", {
                    "container_id": container, "bundle": row.bundle, "rootfs": [m.model_dump() for m in mounts],
                    "io": stdio.model_dump(), "checkpoint": "", "pid": pid,
                })  # fmt: skip
                return pid

            await self._database.mutate(record)
        except BaseException:
            await asyncio.shield(shim.close())
            raise
        self._tasks[key] = task
        await self._ends.follow(task)
        return pid

    async def start(self, namespace: str, container: str, exec_id: str) -> int:
        """Let a created process run."""
        task = self.task(namespace, container)
        async with task.lock:
            process = task.process(exec_id)
            if process.row.status != "created":
                raise FailedPrecondition(f"cannot start a {process.row.status} process")
            if exec_id:
                if task.process("").row.status != "running":
                    raise FailedPrecondition(f"task {container} is {task.process('').row.status}, not running")
                pid = await task.shim.exec(exec_id, process.row.spec, process.row.stdio)
            else:
                pid = await task.shim.start()
            process.row = replace(process.row, pid=pid, status="running")

            def record(tx: Transaction) -> int:
                metadata.put_process(tx, namespace, container, process.row)
                event = {"container_id": container, "pid": pid}
                if exec_id:
                    tx.publish("/tasks/exec-started", {**event, "exec_id": exec_id})
                else:
                    tx.publish("/tasks/start", event)
                return pid

            return await self._database.mutate(record)

    async def exec(self, namespace: str, container: str, exec_id: str, spec: dict[str, Any], stdio: Stdio) -> None:
        """Add a process; `start` starts it."""
        task = self.task(namespace, container)
        async with task.lock:
            status = task.process("").row.status
            if status != "running":
                raise FailedPrecondition(f"cannot exec in a {status} task")
            if exec_id in task.processes:
                raise AlreadyExists(f"process {exec_id} of task {container} exists")
            name = f"process-{secrets.token_hex(6)}.json"
            try:
                (task.bundle.path / name).write_text(json.dumps({**spec, "terminal": stdio.terminal}))
            except OSError as e:
                raise ResourceExhausted(f"process {exec_id}: {e.strerror}") from None
            row = ProcessRow(exec_id, 0, "created", name, stdio)

            def record(tx: Transaction) -> None:
                metadata.put_process(tx, namespace, container, row)
                tx.publish("/tasks/exec-added", {"container_id": container, "exec_id": exec_id})

            await self._database.mutate(record)
            task.processes[exec_id] = Running(row)

    async def kill(self, namespace: str, container: str, signal: int, exec_id: str, *, all: bool) -> None:
        """Send a signal."""
        if not 1 <= signal <= 64:
            raise InvalidArgument(f"signal {signal} is not between 1 and 64")
        task = self.task(namespace, container)
        row = task.process(exec_id).row
        if row.exit_status is not None and not all:
            raise NotFound(f"process {exec_id or 'init'} of task {container} already finished")
        if not row.pid:
            raise FailedPrecondition(f"process {exec_id} of task {container} was not started")
        await task.shim.kill(signal, exec_id, all=all)

    async def pause(self, namespace: str, container: str) -> None:
        """Freeze."""
        await self._freeze(namespace, container, "running", "paused", lambda shim: shim.pause)

    async def resume(self, namespace: str, container: str) -> None:
        """Thaw."""
        await self._freeze(namespace, container, "paused", "resumed", lambda shim: shim.resume)

    async def _freeze(
        self, namespace: str, container: str, wanted: str, event: str, verb: Callable[[Shim], Callable[[], Any]]
    ) -> None:
        task = self.task(namespace, container)
        async with task.lock:
            init = task.process("")
            if init.row.status != wanted:
                raise FailedPrecondition(f"cannot {event.removesuffix('d')} a {init.row.status} task")
            await verb(task.shim)()
            init.row = replace(init.row, status="paused" if event == "paused" else "running")

            def record(tx: Transaction) -> None:
                metadata.put_process(tx, namespace, container, init.row)
                tx.publish(f"/tasks/{event}", {"container_id": container})

            await self._database.mutate(record)

    async def delete(self, namespace: str, container: str, exec_id: str, *, force: bool) -> Exit:
        """Remove a task that does not run, or a process of exec."""
        task = self.task(namespace, container)
        process = task.process(exec_id)
        if process.row.exit_status is None:
            # A created task was never told to run: it may go as it is. A running one goes only by force.
            if process.row.status != "created" and not force:
                raise FailedPrecondition(
                    f"process {exec_id or 'init'} of task {container} is {process.row.status}: kill it first"
                )
            if exec_id and not process.row.pid:
                return await self._forget_unstarted(task, process)
            await self._end(task, process)
        return await (self._delete_exec(task, process) if exec_id else self._delete_task(task, process))

    async def _end(self, task: Task, process: Running) -> None:
        try:
            await task.shim.kill(SIGKILL, process.row.exec, all=False)
        except (NotFound, Unavailable) as e:
            log.debug("killing %s: %s", task.row.container, e)
        await process.ended.wait()

    async def _forget_unstarted(self, task: Task, process: Running) -> Exit:
        """A process of exec that never ran."""
        namespace, container = task.key
        gone = Exit(exit_status=0, exited_at=time_of(time.time_ns()), pid=0)

        def record(tx: Transaction) -> Exit:
            metadata.delete_process(tx, namespace, container, process.row.exec)
            return gone

        answer = await self._database.mutate(record, frees=True)
        task.processes.pop(process.row.exec, None)
        return answer

    async def _delete_exec(self, task: Task, process: Running) -> Exit:
        namespace, container = task.key
        exit = process.exit()
        try:
            await task.shim.delete(process.row.exec, force=False)
        except (NotFound, Unavailable) as e:
            log.debug("deleting %s: %s", process.row.exec, e)

        def record(tx: Transaction) -> Exit:
            metadata.delete_process(tx, namespace, container, process.row.exec)
            tx.publish("/tasks/delete", _delete_event(container, exit, process.row.exec))
            return exit

        answer = await self._database.mutate(record, frees=True)
        task.processes.pop(process.row.exec, None)
        (task.bundle.path / process.row.spec).unlink(missing_ok=True)
        return answer

    async def _delete_task(self, task: Task, process: Running) -> Exit:
        namespace, container = task.key
        async with task.lock:
            if self._tasks.get(task.key) is not task:
                raise NotFound(f"no task {container}")
            task.deleting = True
            exit = process.exit()
            try:
                await task.shim.delete("", force=True)
            except (NotFound, Unavailable):
                await self._launcher.clean(task.bundle)
            await self._ends.unfollow(task)
            await asyncio.to_thread(self._bundles.remove, task.bundle.path)

            def record(tx: Transaction) -> Exit:
                metadata.delete_task(tx, namespace, container)
                tx.publish("/tasks/delete", _delete_event(container, exit, container))
                return exit

            answer = await self._database.mutate(record, frees=True)
            self._tasks.pop(task.key, None)
            return answer

    # ---- looking

    def task(self, namespace: str, container: str) -> Task:
        """NotFound when the container has no task."""
        found = self._tasks.get((namespace, container))
        if found is None:
            raise NotFound(f"no task {container} in namespace {namespace}")
        return found

    def get(self, namespace: str, container: str, exec_id: str) -> Process:
        """The state of a process."""
        return describe(container, self.task(namespace, container).process(exec_id).row)

    def walk(self, namespace: str, after: str, limit: int) -> Page[Process]:
        """The inits, in order of their containers."""
        limit = max(1, min(limit, 1000))
        names = sorted(c for (ns, c) in self._tasks if ns == namespace and c > after)
        items = [describe(c, self._tasks[namespace, c].process("").row) for c in names[:limit]]
        return Page[Process](items=items, next=names[limit - 1] if len(names) > limit else "")

    async def wait(self, namespace: str, container: str, exec_id: str, patience: float) -> Exit | None:
        """The end of a process, as soon as there is one; None after `patience` seconds."""
        process = self.task(namespace, container).process(exec_id)
        if not process.ended.is_set():
            try:
                async with asyncio.timeout(max(0.0, min(patience, 20.0))):
                    await process.ended.wait()
            except TimeoutError:
                return None
        return process.exit()

    def pids(self, namespace: str, container: str) -> list[ProcessInfo]:
        """Every pid inside."""
        task = self.task(namespace, container)
        if task.process("").row.exit_status is not None:
            raise FailedPrecondition(f"task {container} is stopped")
        execs = {p.row.pid: p.row.exec for p in task.processes.values() if p.row.pid}
        return [ProcessInfo(pid=pid, exec_id=execs.get(pid, "")) for pid in members(task.shim.cgroups)]

    async def resize(self, namespace: str, container: str, width: int, height: int, exec_id: str) -> None:
        """Set a terminal's size; without a terminal nothing happens."""
        task = self.task(namespace, container)
        if task.process(exec_id).row.stdio.terminal:
            await task.shim.resize(width, height, exec_id)

    async def close_stdin(self, namespace: str, container: str, exec_id: str) -> None:
        """Close the writer that keeps stdin open."""
        task = self.task(namespace, container)
        if task.process(exec_id).row.exit_status is None:
            await task.shim.close_stdin(exec_id)

    # ---- from one process of this service to the next

    async def recover(self) -> None:
        """Find again what runs; report what ended meanwhile; remove what nobody was ever told of."""
        self._tasks = await self._recovery.run()

    async def stop(self, *, everything: bool) -> None:
        """At the service's end: let go of the shims, or with `everything` end every task first."""
        if everything:
            slots = asyncio.Semaphore(STOP_PARALLEL)

            async def end(task: Task) -> None:
                async with slots:
                    try:
                        await self.delete(*task.key, "", force=True)
                    except WherryError as e:
                        log.error("task %s: %s", task.row.container, e)

            def within(task: Task) -> asyncio.Task[None]:
                with context.use(namespace=task.row.namespace):
                    return asyncio.get_running_loop().create_task(end(task))

            await asyncio.gather(*[within(task) for task in list(self._tasks.values())])
        for task in list(self._tasks.values()):
            await self._ends.unfollow(task)
        if not self._tasks:
            self._bundles.remove_empty()
        await self._launcher.close(idle=not self._tasks)


def _delete_event(container: str, exit: Exit, process_id: str) -> dict[str, Any]:
    return {
        "container_id": container, "id": process_id, "pid": exit.pid, "exit_status": exit.exit_status,
        "exited_at": exit.exited_at.isoformat(),
    }  # fmt: skip
