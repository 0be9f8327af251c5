"""From one process of this service to the next: what runs is found again, and what nobody was told of goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from wherry_shared.api.task import Stdio
from wherry_shared.boot import boot_id
from wherry_shared.errors import AlreadyExists, ResourceExhausted, Unavailable, WherryError
from wherry_shared.sqlite import Database, Transaction
from wherry_shared.values import check_identifier

from . import metadata
from .backends import Bundle, Ended, Launcher
from .bundles import Bundles, cgroup_of_bundle
from .ends import Ends
from .metadata import TaskRow
from .stdio import uris
from .tasks import Key, Running, Task

log = logging.getLogger("wherry.task")

ADOPT_PARALLEL = 16
# A process is asked for right after its FIFOs were made, and within the minute of its call.
FIFO_SECONDS = 120.0


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
        await self._arrive()
        known = metadata.tasks(self._database)
        # Where a state directory was moved, what is in it is none of theirs: its containers know it by its old name.
        owned = {(row.namespace, row.container) for row in known if row.boot != self._boot or Path(row.bundle).is_dir()}
        for namespace, container, path in self._bundles.all():
            if (namespace, container) not in owned:
                await self._discard(namespace, container, path)
        slots = asyncio.Semaphore(ADOPT_PARALLEL)

        async def adopt(row: TaskRow) -> Task:
            async with slots:
                return await self._adopt(row)

        found = await asyncio.gather(*(adopt(row) for row in known))
        return {task.key: task for task in found}

    async def _arrive(self) -> None:
        """Where this node's root is a copy of another's, what runs is the other's: nothing of it is looked for."""
        info = os.stat(Path(self._database.path).parent)
        here, before = f"{info.st_dev:x}:{info.st_ino:x}", metadata.home(self._database)
        if here == before:
            return
        copied = metadata.tasks(self._database) if before else []

        def write(tx: Transaction) -> None:
            for row in copied:
                metadata.move_bundle(tx, row, str(self._bundles.path(row.namespace, row.container)))
            metadata.arrive(tx, here)

        try:
            await self._database.write(write)
        except ResourceExhausted:  # on a full disk, too, a node starts
            if copied:
                raise
        if copied:
            log.warning("this node's root was copied or moved: its %d tasks are not looked for elsewhere", len(copied))

    async def _adopt(self, row: TaskRow) -> Task:
        root = self._bundles.runtime_root(row.namespace, row.binary)
        bundle = Bundle(Path(row.bundle), row.container, row.binary, root, row.namespace)
        task = Task(row, bundle, _Gone())
        task.processes = {p.exec: Running(p) for p in metadata.processes(self._database, row.namespace, row.container)}
        try:
            here = row.boot == self._boot and bundle.path.is_dir()
            alive = await self._launcher.adopt(bundle) if here else None
            if alive is not None:
                task.shim = alive
                await self._ends.reconcile(task)
                await self._ends.follow(task)
                return task
        except Unavailable as e:
            log.warning("the monitor of %s does not answer: %s", row.container, e)
            task.consumer = asyncio.get_running_loop().create_task(self._ends.retry(task))
            return task
        await self._end(task)
        return task

    async def _end(self, task: Task) -> None:
        """Nothing stands by it any more, or the machine was started anew: say how it ended, and clean."""
        found: list[Ended] = []
        try:
            if task.bundle.path.is_dir():
                found = await self._clean(task.bundle)
            elif task.row.boot == self._boot:
                await asyncio.to_thread(_kill_without_bundle, task.bundle.path)
        except WherryError as e:
            log.error("cleaning %s: %s", task.bundle.path, e)
        await self._ends.lost(task, {e.exec_id: e for e in found})

    async def _clean(self, bundle: Bundle) -> list[Ended]:
        """What cannot be reached and yet lives is killed: nobody could ever speak to it again."""
        try:
            return await self._launcher.clean(bundle)
        except AlreadyExists:
            return await self._launcher.clean(bundle, kill=True)

    async def _discard(self, namespace: str, container: str, path: Path) -> None:
        """A bundle that no record is of: its container goes."""
        try:
            check_identifier(container)
            binary = self._bundles.binary_of(path)
            bundle = Bundle(path, container, binary, self._bundles.runtime_root(namespace, binary), namespace)
        except (OSError, WherryError):
            self._bundles.remove(path)
            return
        log.warning("removing task %s of namespace %s: it is on no record", container, namespace)
        await self._kill_monitor_of(bundle)
        await self.abandon(bundle)
        # A shim that was started with other directories does not clear it out of these.
        await asyncio.to_thread(shutil.rmtree, bundle.root / container, ignore_errors=True)

    async def abandon(self, bundle: Bundle) -> None:
        """After a create that failed half-way: nothing of it may stay."""
        for _ in range(100):
            try:
                await self._launcher.clean(bundle, kill=True)
                break
            except AlreadyExists:  # its monitor is on its way out
                await self._kill_monitor_of(bundle)
            except WherryError as e:
                log.warning("cleaning %s: %s", bundle.path, e)
                break
        self._bundles.remove(bundle.path)

    async def _kill_monitor_of(self, bundle: Bundle) -> None:
        try:
            shim = await self._launcher.adopt(bundle)
        except Unavailable:
            return  # it is there and silent: the cleaner kills it
        if shim is not None:
            try:
                await shim.delete("", force=True)
            except WherryError:
                log.info("the monitor of %s refuses to delete; waiting for its end", bundle.path)
            await shim.close()
        await asyncio.sleep(0.02)


def _kill_without_bundle(path: Path) -> None:
    """Its bundle is gone, with all that its container could be reached by; it must not run on unseen."""
    from .monitor import cleanup

    log.warning("%s is gone: what may run of its container is killed", path)
    for warning in cleanup.end_cgroups(cgroup_of_bundle(path)):
        log.warning("%s: %s", path, warning)


def remove_unused_fifos(folder: Path, used: Collection[Stdio]) -> None:
    """Remove the directories of FIFOs in `folder` that belong to no process: a client that was killed left them."""
    named = (Path(uris.parse(text).path) for each in used for text in (each.stdin, each.stdout, each.stderr))
    kept = {parent for path in named for parent in path.parents}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False) or Path(entry.path) in kept:
                continue
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > FIFO_SECONDS:
                log.info("removing %s: no process has these FIFOs", entry.path)
                shutil.rmtree(entry.path, ignore_errors=True)


class _Gone:
    """Stands where a shim was: everything asked of it is Unavailable."""

    def __getattr__(self, name: str) -> Any:
        async def gone(*args: Any, **kwargs: Any) -> Any:
            raise Unavailable("the container's monitor is gone")

        return gone

    def removed(self) -> bool:
        return False

    async def close(self) -> None:
        return None
