"""The threads of one snapshotter, and the tasks that go on whoever waits for them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from wherry_shared import context
from wherry_shared.errors import DeadlineExceeded, Unavailable, WherryError
from wherry_shared.files import translate
from wherry_shared.portions import Portions

from .backends import Check

T = TypeVar("T")

log = logging.getLogger("wherry.snapshot")

THREADS = 4
# Of these one tenant's work, a tree of a million files say, may have so many, and that of all tenants together.
ONE_TENANTS, ALL_TENANTS = 2, 3


class Workers:
    """Runs a backend's functions, which block, and says when they are to stop."""

    def __init__(self, name: str, root: Path) -> None:
        self._name, self._root = name, root
        self._threads = ThreadPoolExecutor(THREADS, f"snapshot-{name}")
        # Removal has a thread of its own: however much there is to remove, nobody waits behind it.
        self._reaper = ThreadPoolExecutor(1, f"snapshot-{name}-reaper")
        self._each = Portions(ONE_TENANTS)
        self._tenants = asyncio.Semaphore(ALL_TENANTS)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.closing = False

    async def close(self) -> None:
        """End what is under way. A removal that is stopped goes on at the next start."""
        self.closing = True
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._reaper.shutdown)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run to the end whoever waits: a request that is cancelled half way would leave what nobody takes away."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (e := task.exception()) is not None:
            log.debug("%s: %s", task.get_name(), e)  # its caller has it too, unless it has gone

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run a backend's function in a thread; the system's refusals become errors of the house."""
        try:
            async with self._turn():
                return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        except OSError as e:
            raise translate(e, f"snapshotter {self._name!r}, {e.filename or self._root}") from e

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """A tenant waits for its own, and holds up nobody else."""
        who = context.current().identity
        if who.role != "tenant":
            yield
            return
        async with self._each.of(who.name), self._tenants:
            yield

    async def reap(self, remove: Callable[..., None], *args: Any) -> None:
        """Remove in the reaper's thread. What cannot be removed stays for the next cleanup, and is told of."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._reaper, remove, *args)
        except (OSError, WherryError) as e:
            if not self.closing:
                log.warning("%s: %s is left for the next cleanup: %s", self._root, args[0], e)

    def check_closing(self) -> None:
        """The check of what nobody waits for."""
        if self.closing:
            raise Unavailable("the service is stopping")

    def check_deadline(self) -> Check:
        """The check of what the request in hand waits for."""
        deadline = context.current().deadline

        def check() -> None:
            self.check_closing()
            if deadline and time.time() > deadline:
                raise DeadlineExceeded("the deadline passed before the snapshot was there")

        return check
