"""Containers that go when their tasks end (`run --rm`): the promise is on record with the task, and kept once."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from wherry_shared import context
from wherry_shared.api.container import Container, Containers
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.api.task import REMOVE_LABEL
from wherry_shared.errors import NotFound, WherryError
from wherry_shared.sqlite import Database

from . import metadata
from .supervisor import Supervisor
from .tasks import Task

log = logging.getLogger("wherry.task")

# How often it is looked whether a task that has not ended is still there at all.
LOOK_SECONDS = 60.0
# So long whoever waits for the end has to remove it themselves (`later`).
LATER_SECONDS = 10.0
RETRY_SECONDS = 0.5
RETRY_MAX = 30.0


class Removals:
    """Sees off each such container: its task, its snapshot, and its record, in this order."""

    def __init__(
        self, database: Database, supervisor: Supervisor, containers: Containers, snapshots: Snapshots
    ) -> None:
        self._database = database
        self._supervisor = supervisor
        self._containers = containers
        self._snapshots = snapshots
        self._waiting: set[asyncio.Task[None]] = set()

    def expect(self, namespace: str, container: str, born: str) -> None:
        """Remove this container, and none that has its name later, when its task has ended."""
        waiting = asyncio.get_running_loop().create_task(self._see_off(namespace, container, born))
        self._waiting.add(waiting)
        waiting.add_done_callback(self._waiting.discard)

    def recover(self) -> None:
        """Go on with what an earlier service promised."""
        for namespace, container, born in metadata.removals(self._database):
            self.expect(namespace, container, born)

    async def stop(self) -> None:
        """What is not done yet is for the next service."""
        for waiting in self._waiting:
            waiting.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)

    async def _see_off(self, namespace: str, container: str, born: str) -> None:
        pause = RETRY_SECONDS
        # Not in the context of the request that made the task: neither its deadline nor its key holds here.
        context.enter(context.Context(namespace=namespace))
        while True:
            try:
                task = await self._ended(namespace, container)
                await self._remove(namespace, container, born, task)
                return
            except WherryError as e:
                log.warning("container %s is not removed yet: %s", container, e)
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_MAX)

    async def _ended(self, namespace: str, container: str) -> Task | None:
        """The task, when it has ended; None where it is deleted, by whomever."""
        task = self._task(namespace, container)
        while task is not None and self._task(namespace, container) is task:
            if task.process("").ended.is_set():
                return task
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await task.process("").ended.wait()
        return None

    def _task(self, namespace: str, container: str) -> Task | None:
        try:
            return self._supervisor.task(namespace, container)
        except NotFound:
            return None

    async def _remove(self, namespace: str, container: str, born: str, task: Task | None) -> None:
        with suppress(NotFound):
            if (await self._containers.get(container)).labels.get(REMOVE_LABEL) == "later":
                await asyncio.sleep(LATER_SECONDS)
        if task is not None and self._task(namespace, container) is task:
            with suppress(NotFound):
                await self._supervisor.delete(namespace, container, "", force=False)
        with suppress(NotFound):
            record = await self._containers.get(container)
            if born_of(record) == born and self._task(namespace, container) is None:
                if record.snapshot_key:
                    with suppress(NotFound):
                        await self._snapshots.remove(record.snapshotter, record.snapshot_key)
                await self._containers.delete(container)
        await self._database.write(lambda tx: metadata.delete_removal(tx, namespace, container, born), frees=True)


def born_of(container: Container) -> str:
    """What tells a container from another that had its name."""
    return container.created_at.isoformat() if container.created_at is not None else ""
