"""When it is collected (the rules of containerd's scheduler), and those who wait for it.

A deletion makes the next collection due. It is learnt of from the bus at once, and if it was missed there, from the
services themselves a few seconds later: they note it in the transaction of the deletion.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from wherry_shared.api.gc import Collected
from wherry_shared.errors import InvalidArgument, Unavailable, WherryError

from .collector import Collector

log = logging.getLogger("wherry.lease.gc")

# A collection is taken to have made mutations wait for this long at least, so that pauses between them have a length.
PAUSE_LEAST = 0.005
# The share of time that collections may run, however short the waits in them are.
RUN_SHARE = 0.1
AVERAGED = 10
LOOK_SECONDS = 5.0
RETRY_FIRST, RETRY_LAST = 0.5, 30.0
NEVER = float("inf")


@dataclass(frozen=True)
class Policy:
    """containerd's settings of the same names; times in seconds.

    pause_threshold: the share of time for which mutations may have to wait. deletion_threshold: so many deletions are
    collected at once; 0: any is, when the pause since the last collection is over. mutation_threshold: the same for
    that many events of any kind (0: never). schedule_delay: from what triggers a collection to its begin.
    startup_delay: from the start to the first.
    """

    pause_threshold: float = 0.02
    deletion_threshold: int = 0
    mutation_threshold: int = 100
    schedule_delay: float = 0.0
    startup_delay: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.pause_threshold <= 0.5:
            raise InvalidArgument(f"pause_threshold={self.pause_threshold} is not a share: above 0 to 0.5 is")
        for name in ("deletion_threshold", "mutation_threshold", "schedule_delay", "startup_delay"):
            if getattr(self, name) < 0:
                raise InvalidArgument(f"{name}={getattr(self, name)} is negative")


class Scheduler:
    """Collects when there is something to do. `collect` does it now."""

    def __init__(self, collector: Collector, policy: Policy) -> None:
        self._collector = collector
        self._policy = policy
        self._wake = asyncio.Event()
        self._waiting: list[asyncio.Future[Collected]] = []
        self._running = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._pauses: list[float] = []
        self._runs: list[float] = []
        self._changes = 0
        self._deletions = 0
        self._retry = RETRY_FIRST
        self._tick = time.monotonic() + policy.startup_delay
        # When to look whether there is something to collect, and when to collect without a look.
        self._look_at, self._collect_at = NEVER, self._tick

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """A collection that is under way is cut off, which harms nothing."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._answer(Unavailable("the lease service is stopping"))

    async def collect(self, *, dry_run: bool = False) -> Collected:
        """A whole collection that begins after this call; those who ask meanwhile share the next one."""
        if dry_run:
            async with self._running:
                return (await self._collector.collect(dry_run=True))[0]
        waiter: asyncio.Future[Collected] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._wake.set()
        return await waiter

    def deleted(self) -> None:
        """Something was deleted, by somebody or by a collection: the next look tells."""
        self._deletions += 1
        threshold = self._policy.deletion_threshold
        at = time.monotonic() if threshold and self._deletions >= threshold else self._next_tick()
        if at + self._policy.schedule_delay < self._look_at:
            self._look_at = at + self._policy.schedule_delay
            self._wake.set()

    # ---- the work

    async def _work(self) -> None:
        while True:
            await self._sleep()
            now = time.monotonic()
            if self._waiting or now >= self._collect_at or await self._finds_something():
                await self._collect()

    async def _sleep(self) -> None:
        """Until something is due or somebody waits."""
        look_anyway = time.monotonic() + LOOK_SECONDS
        while not self._waiting:
            left = min(self._look_at, self._collect_at, look_anyway) - time.monotonic()
            if left <= 0:
                return
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()

    async def _finds_something(self) -> bool:
        self._look_at, self._deletions = NEVER, 0
        try:
            deletions, changes = await self._collector.activity()
        except WherryError as e:
            log.debug("whether there is anything to collect is not known: %s", e)
            return False
        threshold = self._policy.mutation_threshold
        return deletions or bool(threshold and changes - self._changes >= threshold)

    async def _collect(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._look_at = self._collect_at = NEVER
        started = time.monotonic()
        try:
            async with self._running:
                _, self._changes = await self._collector.activity()
                collected, expires = await self._collector.collect()
        except asyncio.CancelledError:
            self._waiting += waiting
            raise
        except Exception as e:  # whatever it is, garbage must go some day
            self._failed(e)
            self._answer(Unavailable(f"the collection failed, and is tried again: {e}"), waiting)
            return
        self._done(collected, time.monotonic() - started, expires)
        self._answer(collected, waiting)

    def _done(self, collected: Collected, seconds: float, expires: float) -> None:
        self._retry = RETRY_FIRST
        self._pauses = [*self._pauses[1 - AVERAGED :], collected.longest_wait]
        self._runs = [*self._runs[1 - AVERAGED :], seconds]
        self._tick = time.monotonic() + self._interval()
        if expires:
            self._collect_at = max(self._tick, time.monotonic() + expires - time.time())
        if self._look_at < self._tick:
            self._look_at = self._tick
        if collected.removed:
            log.info("collected %s in %.3f s, mutations waited %.3f s at most", collected.removed, seconds,
                     collected.longest_wait)  # fmt: skip

    def _failed(self, error: Exception) -> None:
        if isinstance(error, WherryError):
            log.info("a collection failed, it is tried again in %.1f s: %s", self._retry, error)
        else:
            log.error("a collection failed", exc_info=error)
        self._tick = self._collect_at = time.monotonic() + self._retry
        self._retry = min(self._retry * 2, RETRY_LAST)

    def _interval(self) -> float:
        """Seconds from the end of a collection to the next: waits and runs keep to their shares of time."""
        pause = max(_mean(self._pauses), PAUSE_LEAST)
        return max(pause / self._policy.pause_threshold - pause, _mean(self._runs) * (1 / RUN_SHARE - 1))

    def _next_tick(self) -> float:
        """There is one every interval since the last collection."""
        late = time.monotonic() - self._tick
        return self._tick if late <= 0 else self._tick + (late // self._interval() + 1) * self._interval()

    def _answer(self, outcome: Collected | WherryError, waiting: list[asyncio.Future[Collected]] | None = None) -> None:
        """Tell those who wait."""
        if waiting is None:
            waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if waiter.done():
                continue
            if isinstance(outcome, Collected):
                waiter.set_result(outcome)
            else:
                waiter.set_exception(outcome)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
