"""The rules of tasks: which state allows what."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any

from wherry_shared import context
from wherry_shared.api.task import (
    PROCESS_MAX,
    CheckpointOptions,
    Exit,
    MetricsV1,
    Process,
    ProcessInfo,
    Stats,
    Stdio,
    Taken,
)
from wherry_shared.boot import boot_id
from wherry_shared.catalog import raise_if_replayed
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
from wherry_shared.values import Descriptor, Page

from . import metadata, roots
from .backends import Bundle, Creation, Launcher
from .bundles import Bundles
from .ends import SIGKILL, Ends
from .freezing import Freezer
from .metadata import ProcessRow, TaskRow
from .recovery import Recovery
from .stdio.streams import Streams
from .tasks import Key, Running, Task, describe, time_of

log = logging.getLogger("wherry.task")

STOP_PARALLEL = 8
# How long one task may take to answer what is asked of many (containerd's bound).
LOOK_SECONDS = 2.0
# From a SIGKILL to its end; a process in the depths of a dead disk may take for ever.
KILL_SECONDS = 20.0
# So that a page of all fields stays below 512 KiB.
STATS_MAX = 200


class Supervisor:
    """Every task of the node."""

    def __init__(self, database: Database, launcher: Launcher, bundles: Bundles, streams: Streams) -> None:
        self._database = database
        self._launcher = launcher
        self._bundles = bundles
        self._tasks: dict[Key, Task] = {}
        self._creating: dict[Key, str] = {}
        self._boot = boot_id()
        self._ends = Ends(database, launcher, streams)
        self.streams = streams
        self._recovery = Recovery(database, launcher, bundles, self._ends)
        self._freezer = Freezer(database, self.task)

    # ---- life

    def once(self) -> None:
        """Raise Replayed for a request that took effect in an earlier process: what it did may have been undone."""
        raise_if_replayed(self._database)

    def expect(self) -> None:
        """A process is about to be asked for."""
        self._launcher.quicken()

    async def create(
        self, namespace: str, container: str, spec: dict[str, Any], binary: str, creation: Creation,
        born: datetime | None = None, *, removal: str = "", alone: bool = False,
    ) -> int:  # fmt: skip
        """Make the container; it is there and answered only when it is on record. born: when its record was made.

        removal: of which birth the container is that goes with this task; "" when it stays. alone: see roots.check.
        """
        key = (namespace, container)
        if key in self._tasks or key in self._creating:
            raise AlreadyExists(f"task {container} exists")
        if alone:
            roots.check(creation.mounts, self._tasks.values(), self._creating.values())
        self._creating[key] = roots.written(creation.mounts)
        try:
            path = self._bundles.make(namespace, container, spec, binary)
            bundle = Bundle(path, container, binary, self._bundles.runtime_root(namespace, binary), namespace)
            try:
                self.streams.make((*key, ""), path, creation.stdio, born)
                return await self._create(key, bundle, _of_spec(creation, spec), removal)
            except BaseException:
                self.streams.retire((*key, ""))
                await asyncio.shield(self._recovery.abandon(bundle))
                raise
        finally:
            del self._creating[key]

    async def _create(self, key: Key, bundle: Bundle, creation: Creation, removal: str) -> int:
        namespace, container = key
        real = self.streams.real((*key, ""), creation.stdio)
        shim, pid = await self._launcher.launch(bundle, replace(creation, stdio=real))
        try:
            row = TaskRow(namespace, container, str(bundle.path), bundle.binary, self._boot, self._creating[key])
            task = Task(row, bundle, shim)
            init = Running(ProcessRow("", pid, "created", "", creation.stdio))
            task.processes[""] = init

            def record(tx: Transaction) -> int:
                metadata.put_task(tx, row)
                metadata.put_process(tx, namespace, container, init.row)
                if removal:
                    metadata.put_removal(tx, namespace, container, removal)
                tx.publish("/tasks/create", {
                    "container_id": container, "bundle": row.bundle,
                    "rootfs": [m.model_dump() for m in creation.mounts], "io": creation.stdio.model_dump(),
                    "checkpoint": creation.restore, "pid": pid,
                })  # fmt: skip
                return pid

            # A power cut ends what runs: until its end is told, its records need not survive one. But a removal has to.
            await self._database.mutate(record, durable=bool(removal))
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
            if process.untold:
                process.untold, pid = False, process.row.pid
                return await self._database.mutate(lambda tx: pid, durable=False)
            if process.row.status != "created":
                raise FailedPrecondition(f"cannot start a {process.row.status} process of task {container}")
            if exec_id:
                if task.process("").row.status == "stopped":
                    raise FailedPrecondition(f"container {container} init process is not running: it has stopped")
                self._launcher.quicken()
                stdio = self.streams.real((namespace, container, exec_id), process.row.stdio)
                self.streams.of((namespace, container, exec_id)).started()
                pid = await task.shim.exec(exec_id, process.row.spec, stdio)
            else:
                self.streams.of((namespace, container, "")).started()
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

            return await self._database.mutate(record, durable=False)

    async def exec(
        self, namespace: str, container: str, exec_id: str, spec: dict[str, Any], stdio: Stdio, *, kept: int = -1
    ) -> None:  # fmt: skip
        """Add a process; `start` starts it. kept: see ProcessRow."""
        task = self.task(namespace, container)
        async with task.lock:
            status = task.process("").row.status
            if status not in ("created", "running"):
                raise FailedPrecondition(f"cannot exec in a {status} state: task {container}")
            if exec_id in task.processes:
                raise AlreadyExists(f"process {exec_id} of task {container} exists")
            self._launcher.quicken()
            name = f"process-{secrets.token_hex(6)}.json"
            document = _document(exec_id, {**spec, "terminal": stdio.terminal})
            try:
                (task.bundle.path / name).write_bytes(document)
            except OSError as e:
                raise ResourceExhausted(f"process {exec_id}: {e.strerror}") from None
            row = ProcessRow(exec_id, 0, "created", name, stdio, kept=kept)

            def record(tx: Transaction) -> None:
                metadata.put_process(tx, namespace, container, row)
                tx.publish("/tasks/exec-added", {"container_id": container, "exec_id": exec_id})

            try:
                self.streams.make((namespace, container, exec_id), task.bundle.path, stdio)
                await self._database.mutate(record, durable=False)
            except BaseException:
                self._forget(task, Running(row))
                raise
            task.processes[exec_id] = Running(row)

    async def kill(self, namespace: str, container: str, signal: int, exec_id: str, *, all: bool) -> None:
        """Send a signal."""
        if not 1 <= signal <= 64:
            raise InvalidArgument(f"signal {signal} is not between 1 and 64")
        task = self.task(namespace, container)
        row = task.process(exec_id).row
        key = context.current().key
        if row.exit_status is not None or (all and task.process("").row.exit_status is not None):
            if key and await task.shim.has_sent(exec_id, key):
                return  # a second delivery, of what ended it
            raise NotFound(f"process {exec_id or 'init'} of task {container}: process already finished")
        if not row.pid:
            raise FailedPrecondition(f"process {exec_id or 'init'} of task {container}: process not created")
        await task.shim.kill(signal, exec_id, all=all, key=key)

    async def pause(self, namespace: str, container: str, hold: str = "") -> None:
        """Freeze."""
        await self._freezer.pause(self.task(namespace, container), hold)

    async def resume(self, namespace: str, container: str, hold: str = "") -> None:
        """Thaw."""
        await self._freezer.resume(self.task(namespace, container), hold)

    async def update(
        self, namespace: str, container: str, resources: dict[str, Any], annotations: dict[str, str]
    ) -> None:
        """Change limits."""
        task = self.task(namespace, container)
        async with task.lock:
            if task.process("").row.exit_status is not None:
                raise FailedPrecondition(f"cannot update a stopped container: task {container}")
            await task.shim.update(resources, annotations)
            await self._database.mutate(lambda tx: None, durable=False)

    async def checkpoint(
        self, namespace: str, container: str, options: CheckpointOptions,
        keep: Callable[[], Awaitable[list[Descriptor]]] | None = None,
    ) -> list[Descriptor]:  # fmt: skip
        """Write the task's whole state into a directory. keep: what makes content of that."""
        task = self.task(namespace, container)
        async with task.lock:
            status = task.process("").row.status
            if status not in ("running", "paused"):
                raise FailedPrecondition(f"cannot checkpoint a {status} container: task {container}")
            await task.shim.checkpoint(options)
            made = await keep() if keep is not None else []

            def record(tx: Transaction) -> list[Descriptor]:
                where = made[0].digest if made else options.image
                tx.publish("/tasks/checkpointed", {"container_id": container, "checkpoint": where})
                return made

            return await self._database.mutate(record)

    async def delete(self, namespace: str, container: str, exec_id: str, *, force: bool) -> Exit:
        """Remove a task that does not run, or a process of exec."""
        task = self.task(namespace, container)
        process = task.process(exec_id)
        if process.row.exit_status is None:
            # A created task was never told to run: it may go as it is. A running one goes only by force.
            if process.row.status != "created" and not force:
                raise FailedPrecondition(
                    f"cannot delete a {process.row.status} process: {exec_id or 'init'} of task {container}"
                )
            if exec_id and not process.row.pid:
                return await self._forget_unstarted(task, process)
            if process.row.pid:
                await self._end(task, process)
        return await (self._delete_exec(task, process) if exec_id else self._delete_task(task, process))

    async def _end(self, task: Task, process: Running) -> None:
        try:
            with suppress(NotFound):  # it has ended, and that is about to be told
                await task.shim.kill(SIGKILL, process.row.exec, all=False)
            async with asyncio.timeout(KILL_SECONDS):
                await process.ended.wait()
        except (Unavailable, TimeoutError) as e:
            # What stands by it hangs or is gone. It may cost its own container, and nothing else.
            log.warning("task %s does not let itself be killed: %s", task.row.container, e)
            await self._ends.give_up(task)

    async def _forget_unstarted(self, task: Task, process: Running) -> Exit:
        """A process of exec that never ran."""
        namespace, container = task.key
        gone = Exit(exit_status=0, exited_at=time_of(time.time_ns()), pid=0)

        def record(tx: Transaction) -> Exit:
            metadata.delete_process(tx, namespace, container, process.row.exec)
            return gone

        answer = await self._database.mutate(record, frees=True, durable=False)
        self._forget(task, process)
        return answer

    def _forget(self, task: Task, process: Running) -> None:
        """A process of exec that is on record no more."""
        task.processes.pop(process.row.exec, None)
        self.streams.retire((*task.key, process.row.exec))
        (task.bundle.path / process.row.spec).unlink(missing_ok=True)

    async def _delete_exec(self, task: Task, process: Running) -> Exit:
        namespace, container = task.key
        exit = process.exit()
        try:
            await task.shim.delete(process.row.exec, force=False)
        except (NotFound, Unavailable) as e:
            log.info("deleting %s: %s", process.row.exec, e)

        def record(tx: Transaction) -> Exit:
            metadata.delete_process(tx, namespace, container, process.row.exec)
            tx.publish("/tasks/delete", _delete_event(container, exit, process.row.exec))
            return exit

        answer = await self._database.mutate(record, frees=True, durable=False)
        self._forget(task, process)
        return answer

    async def _delete_task(self, task: Task, process: Running) -> Exit:
        namespace, container = task.key
        async with task.lock:
            if self._tasks.get(task.key) is not task:
                raise NotFound(f"no task {container}")
            task.deleting = True
            # What was to be restored and never was has not ended either.
            exit = process.exit() if process.row.pid else Exit(exit_status=0, exited_at=time_of(time.time_ns()))
            # What cannot fail any more is done while the record goes.
            sure = process.ended.is_set() and task.shim.removed()
            if not sure:
                await self._ends.take_away(task)

            def record(tx: Transaction) -> Exit:
                metadata.delete_task(tx, namespace, container)
                tx.publish("/tasks/delete", _delete_event(container, exit, container))
                return exit

            for exec_id in task.processes:
                self.streams.retire((*task.key, exec_id))
            answer, _ = await asyncio.gather(
                self._database.mutate(record, frees=True), self._let_go(task, away=not sure)
            )
            self._tasks.pop(task.key, None)
            return answer

    async def _let_go(self, task: Task, *, away: bool) -> None:
        """Of the shim and the bundle. away: the container is known to be taken away.

        A bundle without a record, or the other way round, is what the next start of this service cleans.
        """
        if not away:
            try:
                await self._ends.take_away(task)
            except WherryError as e:
                log.error("the monitor of %s stays until this service starts again: %s", task.row.container, e)
                await self._ends.unfollow(task)
                return
        await asyncio.gather(self._ends.unfollow(task), asyncio.to_thread(self._bundles.remove, task.bundle.path))

    # ---- looking

    def task(self, namespace: str, container: str) -> Task:
        """NotFound when the container has no task."""
        found = self._tasks.get((namespace, container))
        if found is None:
            raise NotFound(f"no task {container} in namespace {namespace}")
        return found

    def has(self, namespace: str, container: str) -> bool:
        """Whether the container has a task, or is about to get one."""
        return (namespace, container) in self._tasks or (namespace, container) in self._creating

    def get(self, namespace: str, container: str, exec_id: str) -> Process:
        """The state of a process."""
        process = self.task(namespace, container).process(exec_id)
        process.asked = time.monotonic()
        return describe(container, process.row)

    def walk(self, namespace: str, after: str, limit: int) -> Page[Process]:
        """The inits, in order of their containers."""
        limit = max(1, min(limit, 1000))
        names = sorted(c for (ns, c) in self._tasks if ns == namespace and c > after)
        items = [describe(c, self._tasks[namespace, c].process("").row) for c in names[:limit]]
        return Page[Process](items=items, next=names[limit - 1] if len(names) > limit else "")

    async def wait(self, namespace: str, container: str, exec_id: str, patience: float) -> Exit | None:
        """The end of a process, as soon as there is one; None after `patience` seconds."""
        process = self.task(namespace, container).process(exec_id)
        process.asked = time.monotonic()
        if not process.ended.is_set():
            try:
                async with asyncio.timeout(max(0.0, min(patience, 20.0))):
                    await process.ended.wait()
            except TimeoutError:
                return None
        return process.exit()

    async def pids(self, namespace: str, container: str) -> list[ProcessInfo]:
        """Every pid inside."""
        task = self.task(namespace, container)
        if task.process("").row.exit_status is not None:
            raise FailedPrecondition(f"task {container} is stopped")
        found = await task.shim.pids()
        execs = {p.row.pid: p.row.exec for p in task.processes.values() if p.row.pid and p.row.exit_status is None}
        return [ProcessInfo(pid=pid, exec_id=execs.get(pid, "")) for pid in found]

    async def stats(self, namespace: str, wanted: Collection[str], after: str, limit: int) -> Page[Stats]:
        """What tasks use; those that have ended or have no cgroup are missing, those that do not answer say so."""
        limit = max(1, min(limit, STATS_MAX))
        chosen = set(wanted)
        names = sorted(
            c
            for (ns, c), task in self._tasks.items()
            if ns == namespace and c > after and (not chosen or c in chosen)
            if task.process("").row.exit_status is None
        )
        found = await asyncio.gather(*(self._stats_of(namespace, name) for name in names[:limit]))
        return Page[Stats](
            items=[each for each in found if each is not None], next=names[limit - 1] if len(names) > limit else ""
        )

    async def _stats_of(self, namespace: str, container: str) -> Stats | None:
        task = self._tasks.get((namespace, container))
        if task is None or task.process("").row.exit_status is not None:
            return None
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                found = await task.shim.stats()
        except (WherryError, TimeoutError) as e:
            if task.process("").row.exit_status is not None:
                return None
            log.info("stats of %s: %s", container, e)
            reason = str(e) or f"it has not answered in {LOOK_SECONDS:.0f} s"
            return Stats(container_id=container, timestamp=time_of(time.time_ns()), error=reason)
        if found is None:
            return None
        one = isinstance(found, MetricsV1)
        return Stats(
            container_id=container, timestamp=time_of(time.time_ns()), v1=found if one else None,
            v2=None if one else found,
        )  # fmt: skip

    async def resize(self, namespace: str, container: str, width: int, height: int, exec_id: str) -> None:
        """Set a terminal's size; without a terminal nothing happens."""
        if not (0 <= width <= 0xFFFF and 0 <= height <= 0xFFFF):
            raise InvalidArgument(f"a terminal of {width} x {height} characters")
        task = self.task(namespace, container)
        row = task.process(exec_id).row
        if row.exit_status is not None and exec_id:
            raise FailedPrecondition(f"cannot resize a stopped container: process {exec_id} of task {container}")
        if row.stdio.terminal and row.exit_status is None and row.pid:
            await task.shim.resize(width, height, exec_id)

    async def close_stdin(self, namespace: str, container: str, exec_id: str) -> None:
        """Close the writer that keeps stdin open."""
        task = self.task(namespace, container)
        if task.process(exec_id).row.exit_status is None:
            self.streams.end_input((namespace, container, exec_id))
            await task.shim.close_stdin(exec_id)

    async def input(
        self, namespace: str, container: str, writer: str, offset: int, data: bytes, exec_id: str, *, eof: bool,
        patience: float,
    ) -> Taken:  # fmt: skip
        """Take bytes for a running process's stdin."""
        row = self.task(namespace, container).process(exec_id).row
        if row.exit_status is not None or not row.pid:
            raise FailedPrecondition(f"process {exec_id or 'init'} of task {container} is {row.status}, not running")
        taken = await self.streams.input((namespace, container, exec_id), writer, offset, data, patience)
        if eof and taken.total >= offset + len(data):
            await self.close_stdin(namespace, container, exec_id)
        return taken

    # ---- from one process of this service to the next

    async def recover(self) -> None:
        """Find again what runs; report what ended meanwhile; remove what nobody was ever told of."""
        self._tasks = await self._recovery.run()
        for task in self._tasks.values():
            for row in [process.row for process in task.processes.values()]:
                started, over = bool(row.pid), row.exit_status is not None
                self.streams.find((*task.key, row.exec), task.bundle.path, row.stdio, started=started, over=over)
        self._freezer.recover(self._tasks.values())

    def waits(self, namespace: str, container: str) -> bool:
        """Whether the container has a task that was not started yet."""
        task = self._tasks.get((namespace, container))
        return task is not None and task.process("").row.status == "created"

    def execs(self) -> list[tuple[str, str, str]]:
        """Every process of exec: namespace, container, id."""
        return [(*task.key, name) for task in self._tasks.values() for name in task.processes if name]

    def stdio(self) -> list[Stdio]:
        """The streams of every process."""
        return [process.row.stdio for task in self._tasks.values() for process in task.processes.values()]

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
        await self._freezer.stop()
        for task in list(self._tasks.values()):
            await self._ends.unfollow(task)
        self.streams.close()
        if not self._tasks:
            self._bundles.remove_empty()
        await self._launcher.close(idle=not self._tasks)


def _document(exec_id: str, process: dict[str, Any]) -> bytes:
    """A process as the runtime reads it. InvalidArgument: JSON has no word for what is in it. ResourceExhausted."""
    try:
        made = json.dumps(process, ensure_ascii=False).encode()
    except (TypeError, ValueError) as e:
        raise InvalidArgument(f"process {exec_id}: {e}") from None
    if len(made) > PROCESS_MAX:
        raise ResourceExhausted(f"process {exec_id} takes {len(made)} bytes as JSON, and at most {PROCESS_MAX} fit")
    return made


def _of_spec(creation: Creation, spec: dict[str, Any]) -> Creation:
    """With what it says of its specification."""
    hooks, linux = spec.get("hooks") or {}, spec.get("linux") or {}
    special = hooks.get("poststop") or linux.get("intelRdt") or ":" in (linux.get("cgroupsPath") or "")
    annotated = any(key.startswith("run.oci.") for key in spec.get("annotations") or {})
    return replace(creation, poststart=bool(hooks.get("poststart")), plain=not special and not annotated)


def _delete_event(container: str, exit: Exit, process_id: str) -> dict[str, Any]:
    return {
        "container_id": container, "id": process_id, "pid": exit.pid, "exit_status": exit.exit_status,
        "exited_at": exit.exited_at.isoformat(),
    }  # fmt: skip
