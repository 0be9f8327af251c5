"""From one process of this service to the next: what runs is found again, and what nobody was told of goes."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from wherry_shared.errors import AlreadyExists, Unavailable, WherryError
from wherry_shared.sqlite import Database, Transaction
from wherry_shared.values import check_identifier

from . import metadata
from .backends import Bundle, Launcher
from .bundles import Bundles
from .ends import Ends
from .metadata import ProcessRow, TaskRow
from .tasks import Key, Running, Task

log = logging.getLogger("wherry.task")

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The kernel's id of this boot."""
    return BOOT_ID.read_text().strip()


class Recovery:
    """Finds the tasks of an earlier process of this service."""

    def __init__(self, database: Database, launcher: Launcher, bundles: Bundles, ends: Ends) -> None:
        self._database = database
        self._launcher = launcher
        self._bundles = bundles
        self._ends = ends
        self._boot = boot_id()

    async def run(self) -> dict[Key, Task]:
        """Every task on record, with its ends of meanwhile recorded and its shim followed."""
        known = metadata.tasks(self._database)
        owned = {(row.namespace, row.container) for row in known}
        for namespace, container, path in self._bundles.all():
            if (namespace, container) not in owned:
                await self._discard(namespace, container, path)
        found = [await self._adopt(row) for row in known]
        return {task.key: task for task in found}

    async def _adopt(self, row: TaskRow) -> Task:
        bundle = Bundle(
            Path(row.bundle), row.container, row.binary, self._bundles.runtime_root(row.namespace, row.binary)
        )
        alive = await self._launcher.adopt(bundle) if row.boot == self._boot and bundle.path.is_dir() else None
        task = Task(row, bundle, alive or _Gone())
        task.processes = {p.exec: Running(p) for p in metadata.processes(self._database, row.namespace, row.container)}
        if alive is not None:
            await self._reconcile(task, await alive.state())
            await self._ends.follow(task)
        else:
            found = await self._launcher.clean(bundle) if bundle.path.is_dir() else []
            await self._ends.lost(task, {e.exec_id: e for e in found})
        return task

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
        await self.abandon(bundle)

    async def abandon(self, bundle: Bundle) -> None:
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
