"""The rules of tasks: which state allows what, each end exactly once, and what a restart finds again."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

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
from wherry_shared.values import Mount, Page, check_identifier

from . import metadata
from .backends import Bundle, Ended, Launcher, Notice, Shim
from .bundles import Bundles
from .metadata import ProcessRow, TaskRow
from .monitor import cgroups

log = logging.getLogger("wherry.task")

SIGKILL = 9
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
STOP_PARALLEL = 8
Key = tuple[str, str]


class Running:
    """One process that the supervisor knows: its row, and who waits for its end."""

    def __init__(self, row: ProcessRow) -> None:
        self.row = row
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


class Supervisor:
    """Every task of the node."""

    def __init__(self, database: Database, launcher: Launcher, bundles: Bundles) -> None:
        self._database = database
        self._launcher = launcher
        self._bundles = bundles
        self._tasks: dict[Key, Task] = {}
        self._creating: set[Key] = set()
        self._boot = BOOT_ID.read_text().strip()

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
                await asyncio.shield(self._abandon(bundle))
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
        await self._follow(task)
        return pid

    async def _abandon(self, bundle: Bundle) -> None:
        """After a create that failed half-way: nothing of it may stay."""
        for _ in range(100):
            try:
                await self._launcher.clean(bundle)
                break
            except AlreadyExists:  # its monitor is on its way out
                await self._kill_monitor_of(bundle)
            except WherryError as e:
                log.warning("cleaning %s: %s", bundle.path, e)
                break
        self._bundles.remove(bundle.path)

    async def _kill_monitor_of(self, bundle: Bundle) -> None:
        shim = await self._launcher.adopt(bundle)
        if shim is not None:
            try:
                await shim.delete("", force=True)
            except WherryError:
                log.info("the monitor of %s refuses to delete; waiting for its end", bundle.path)
            await shim.close()
        await asyncio.sleep(0.02)

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
        gone = Exit(exit_status=0, exited_at=_time(time.time_ns()), pid=0)

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
            await self._unfollow(task)
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
        return _describe(container, self.task(namespace, container).process(exec_id).row)

    def walk(self, namespace: str, after: str, limit: int) -> Page[Process]:
        """The inits, in order of their containers."""
        limit = max(1, min(limit, 1000))
        names = sorted(c for (ns, c) in self._tasks if ns == namespace and c > after)
        items = [_describe(c, self._tasks[namespace, c].process("").row) for c in names[:limit]]
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
        return [ProcessInfo(pid=pid, exec_id=execs.get(pid, "")) for pid in _members(task.shim.cgroups)]

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

    # ---- what the shims tell

    async def _follow(self, task: Task) -> None:
        task.consumer = asyncio.get_running_loop().create_task(self._consume(task))
        await task.shim.watch(task.notices.put_nowait, lambda: task.notices.put_nowait(None))

    async def _unfollow(self, task: Task) -> None:
        await task.shim.close()
        if task.consumer is not None and task.consumer is not asyncio.current_task():
            task.consumer.cancel()

    async def _consume(self, task: Task) -> None:
        while not task.deleting:
            notice = await task.notices.get()
            try:
                if notice is None:
                    await self._shim_died(task)
                    return
                async with task.lock:
                    await self._take(task, notice)
            except WherryError as e:
                # The monitor's record stays: a restart of this service, if nothing sooner, reports it.
                log.error("the end of a process of %s could not be recorded: %s", task.row.container, e)
                await asyncio.sleep(0.5)
                if notice is not None:
                    task.notices.put_nowait(notice)

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
            "exit_status": notice.exit_status, "exited_at": _time(notice.exited_ns).isoformat(),
        }  # fmt: skip
        event |= {flag: True for flag in ("oom", "shim_died") if getattr(notice, flag)}

        def record(tx: Transaction) -> None:
            metadata.put_process(tx, namespace, container, row)
            tx.publish("/tasks/exit", event, namespace=namespace)

        # An end cannot be refused for want of room: it may use what is kept for removals.
        await self._database.write(record, frees=True)
        process.row = row
        process.ended.set()

    async def _shim_died(self, task: Task) -> None:
        """Kill and clean what its monitor left, and report the ends: the processes of exec first."""
        if task.deleting:
            return
        log.warning("the monitor of %s died; its container is killed", task.row.container)
        async with task.lock:
            found = {e.exec_id: e for e in await self._launcher.clean(task.bundle)}
            await self._lost(task, found)

    async def _lost(self, task: Task, found: dict[str, Ended]) -> None:
        for exec_id, process in sorted(task.processes.items(), key=lambda item: (item[0] == "", item[0])):
            if process.ended.is_set() or not process.row.pid:
                continue
            unknown = Ended(exec_id, process.row.pid, 128 + SIGKILL, time.time_ns(), shim_died=True)
            await self._take(task, found.get(exec_id, unknown))

    # ---- from one process of this service to the next

    async def recover(self) -> None:
        """Find again what runs; report what ended meanwhile; remove what nobody was ever told of."""
        known = metadata.tasks(self._database)
        owned = {(row.namespace, row.container) for row in known}
        for namespace, container, path in self._bundles.all():
            if (namespace, container) not in owned:
                await self._discard(namespace, container, path)
        for row in known:
            await self._adopt(row)

    async def _adopt(self, row: TaskRow) -> None:
        bundle = Bundle(
            Path(row.bundle), row.container, row.binary, self._bundles.runtime_root(row.namespace, row.binary)
        )
        alive = await self._launcher.adopt(bundle) if row.boot == self._boot and bundle.path.is_dir() else None
        task = Task(row, bundle, alive or _Gone())
        task.processes = {p.exec: Running(p) for p in metadata.processes(self._database, row.namespace, row.container)}
        self._tasks[task.key] = task
        if alive is not None:
            await self._reconcile(task, await alive.state())
            await self._follow(task)
        else:
            found = await self._launcher.clean(bundle) if bundle.path.is_dir() else []
            await self._lost(task, {e.exec_id: e for e in found})

    async def _reconcile(self, task: Task, state: dict[str, Any]) -> None:
        """A start that took effect, but whose record was lost with its service, is recorded now."""
        namespace, container = task.key
        init = task.process("")
        if init.row.status == "created" and state["state"] != "created":
            init.row = replace(init.row, pid=int(state["pid"]), status="running")

            def record(tx: Transaction) -> None:
                metadata.put_process(tx, namespace, container, init.row)
                tx.publish("/tasks/start", {"container_id": container, "pid": init.row.pid}, namespace=namespace)

            await self._database.write(record)
        for exec_id, described in state.get("execs", {}).items():
            process = task.processes.get(exec_id)
            if process is not None and not process.row.pid:
                process.row = replace(process.row, pid=int(described["pid"]), status="running")
                event = {"container_id": container, "exec_id": exec_id, "pid": process.row.pid}
                await self._database.write(partial(_record_exec, namespace, container, process.row, event))

    async def _discard(self, namespace: str, container: str, path: Path) -> None:
        """A bundle without a record was never answered to anybody: its container goes."""
        try:
            check_identifier(container)
            config = json.loads((path / "monitor.json").read_text())
            bundle = Bundle(path, container, str(config["runtime"]), Path(str(config["root"])))
        except (OSError, ValueError, KeyError, WherryError):
            self._bundles.remove(path)
            return
        log.warning("removing task %s of namespace %s: its creation was never completed", container, namespace)
        await self._kill_monitor_of(bundle)
        await self._abandon(bundle)

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

            from wherry_shared import context

            def within(task: Task) -> asyncio.Task[None]:
                with context.use(namespace=task.row.namespace):
                    return asyncio.get_running_loop().create_task(end(task))

            await asyncio.gather(*[within(task) for task in list(self._tasks.values())])
        for task in list(self._tasks.values()):
            await self._unfollow(task)
        if not self._tasks:
            self._bundles.remove_empty()
        await self._launcher.close(idle=not self._tasks)


class _Gone:
    """Stands where a shim was: everything asked of it is Unavailable."""

    cgroups: dict[str, str] = {}  # noqa: RUF012 - never written

    def __getattr__(self, name: str) -> Any:
        async def gone(*args: Any, **kwargs: Any) -> Any:
            raise Unavailable("the container's monitor is gone")

        return gone

    async def close(self) -> None:
        return None


def _record_exec(namespace: str, container: str, row: ProcessRow, event: dict[str, Any], tx: Transaction) -> None:
    metadata.put_process(tx, namespace, container, row)
    tx.publish("/tasks/exec-started", event, namespace=namespace)


def _members(own: dict[str, str]) -> list[int]:
    """The pids in a container's cgroup and those below it."""
    for controllers, path in own.items():
        if path == "/":
            continue
        found: list[int] = []
        for directory, _, _ in os.walk(cgroups.folder(controllers, path)):
            with suppress(OSError):
                found += [int(line) for line in (Path(directory) / "cgroup.procs").read_text().split()]
        if found:
            return sorted(found)
    return []


def _time(ns: int) -> Any:
    return ProcessRow("", 0, "", "", Stdio(), 0, ns).exited_at


def _describe(container: str, row: ProcessRow) -> Process:
    return Process(
        container_id=container, exec_id=row.exec, pid=row.pid, status=row.status,
        stdio=row.stdio, exit_status=row.exit_status, exited_at=row.exited_at,
    )  # fmt: skip


def _delete_event(container: str, exit: Exit, process_id: str) -> dict[str, Any]:
    return {
        "container_id": container, "id": process_id, "pid": exit.pid, "exit_status": exit.exit_status,
        "exited_at": exit.exited_at.isoformat(),
    }  # fmt: skip
