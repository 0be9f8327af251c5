"""Containers that stand still: until somebody resumes them, or for as long as whoever holds them says so.

A hold is on record before its container stands still: where its holder is killed, or this service beside it, the
container goes on HOLD_SECONDS after the hold was last asked for, or after the next start of this service.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from wherry_shared import context
from wherry_shared.api.task import HOLD_SECONDS
from wherry_shared.catalog import raise_if_replayed
from wherry_shared.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    WherryError,
)  # fmt: skip
from wherry_shared.sqlite import Database, Transaction

from . import metadata
from .tasks import Key, Running, Task

log = logging.getLogger("wherry.task")

HOLD_MAX = 76
RETRY_SECONDS = 5.0
# After these nobody knows whether what was asked of a shim has taken effect.
_UNKNOWN = (asyncio.CancelledError, DeadlineExceeded, Unavailable)


class Freezer:
    """Pauses and resumes tasks. get: the task of a key, or NotFound."""

    def __init__(self, database: Database, get: Callable[[str, str], Task]) -> None:
        self._database = database
        self._get = get
        self._holds: dict[Key, asyncio.Task[None]] = {}

    async def pause(self, task: Task, hold: str) -> None:
        """Freeze; asked again with the same hold, it goes on to be held."""
        if len(hold) > HOLD_MAX:
            raise InvalidArgument(f"a hold of more than {HOLD_MAX} characters")
        async with task.lock:
            raise_if_replayed(self._database)
            init = task.process("")
            if hold and init.row.hold == hold and init.row.status == "paused":
                self._expect(task, hold)
                return
            if hold and init.row.hold == hold and init.row.status == "running":
                raise FailedPrecondition(f"task {task.row.container} went on meanwhile: it is not held any more")
            cut_off = _allowed(task, init, "pause")
            if cut_off and (await task.shim.state()).paused:
                init.row = replace(init.row, status="paused", hold=hold)
                self._expect(task, hold)
            else:
                await self._pause(task, init, hold)
            await self._done(task, init, "paused")

    async def resume(self, task: Task, hold: str) -> None:
        """Thaw. hold: only what stands still for it, or FailedPrecondition."""
        async with task.lock:
            raise_if_replayed(self._database)
            init = task.process("")
            if hold and hold != init.row.hold:
                raise FailedPrecondition(f"task {task.row.container} is not held by {hold} (any more)")
            cut_off = _allowed(task, init, "resume")
            if cut_off and not (await task.shim.state()).paused:
                init.row = replace(init.row, status="running")
            else:
                await self._resume(task, init)
            await self._done(task, init, "resumed")

    async def _done(self, task: Task, init: Running, event: str) -> None:
        namespace, container = task.key

        def record(tx: Transaction) -> None:
            metadata.put_process(tx, namespace, container, init.row)
            tx.publish(f"/tasks/{event}", {"container_id": container})

        await self._database.mutate(record, durable=False)

    async def _pause(self, task: Task, init: Running, hold: str) -> None:
        """Whoever looks meanwhile sees it pausing, and so it stays where nobody knows what became of it."""
        row = replace(init.row, status="pausing", hold=hold)
        if hold:
            await self._database.write(partial(_put, *task.key, row), durable=False)
        init.row = row
        self._expect(task, hold)
        try:
            await task.shim.pause()
        except BaseException as e:
            if init.row.status == "pausing" and not isinstance(e, _UNKNOWN):
                init.row = replace(init.row, status="running", hold="")
            raise
        if init.row.status == "pausing":
            init.row = replace(init.row, status="paused")

    async def _resume(self, task: Task, init: Running) -> None:
        try:
            await task.shim.resume()
        except _UNKNOWN:
            if init.row.status == "paused":
                init.row = replace(init.row, status="pausing")
            raise
        if init.row.status in ("paused", "pausing"):
            init.row = replace(init.row, status="running")

    # ---- holds

    def recover(self, tasks: Iterable[Task]) -> None:
        """What an earlier process held is held for HOLD_SECONDS from now."""
        for task in tasks:
            init = task.process("")
            if init.row.status in ("paused", "pausing"):
                self._expect(task, init.row.hold)

    async def stop(self) -> None:
        """What is held stays so until the next process."""
        ending = list(self._holds.values())
        for each in ending:
            each.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def _expect(self, task: Task, hold: str) -> None:
        """Let go of a hold in HOLD_SECONDS, and not before. Called with the task's lock held, so it is not at that."""
        before = self._holds.pop(task.key, None)
        if before is not None:
            before.cancel()
        if not hold:
            return
        ending = asyncio.get_running_loop().create_task(self._let_go(task, hold))
        self._holds[task.key] = ending
        ending.add_done_callback(partial(self._forget, task.key))

    def _forget(self, key: Key, ending: asyncio.Task[None]) -> None:
        if self._holds.get(key) is ending:
            del self._holds[key]

    async def _let_go(self, task: Task, hold: str) -> None:
        # Not in the context of the request that held it: neither its deadline nor its key holds here.
        context.enter(context.Context(namespace=task.row.namespace))
        await asyncio.sleep(HOLD_SECONDS)
        while True:
            try:
                if self._get(*task.key) is task and not task.process("").ended.is_set():
                    await self.resume(task, hold)
                    log.warning("task %s goes on: whoever held it has not been heard of", task.row.container)
                return
            except (NotFound, FailedPrecondition):
                return  # it was resumed, or is gone
            except WherryError as e:
                log.warning("task %s cannot go on yet: %s", task.row.container, e)
            await asyncio.sleep(RETRY_SECONDS)


def _allowed(task: Task, init: Running, verb: str) -> bool:
    """Whether an earlier attempt was cut off: nobody is at it, so whoever was, was killed or gave up at it, and it may
    be done. FailedPrecondition when it cannot be asked for now."""
    cut_off = init.row.status == "pausing"
    if not cut_off and init.row.status != ("running" if verb == "pause" else "paused"):
        raise FailedPrecondition(f"cannot {verb} a {init.row.status} container: task {task.row.container}")
    return cut_off


def _put(namespace: str, container: str, row: metadata.ProcessRow, tx: Transaction) -> None:
    metadata.put_process(tx, namespace, container, row)
