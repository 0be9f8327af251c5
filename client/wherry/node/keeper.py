"""Starts containers again that end against their restart policy (wherry.restarts).

It knows nothing but what the services say, so it can be killed at any time: it looks at every container when it
starts, and then at each whose init has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterable
from pathlib import Path

from wherry_shared.api.events import Envelope
from wherry_shared.errors import DeadlineExceeded, NotFound, Unavailable, WherryError
from wherry_shared.runtime import log_to_stderr, run_loop
from wherry_shared.values import is_identifier

import wherry
from wherry.paging import walk
from wherry.restarts import STOPPED, count_of, policy_of

log = logging.getLogger("wherry.keeper")

# Docker's: twice as long each time, and from the start again after a life that was long enough.
PAUSE_FIRST, PAUSE_MAX, STEADY_SECONDS = 0.1, 60.0, 10.0

Key = tuple[str, str]


def serve(state: Path, log_level: str, *, boot: bool, node: str = "", mark: Path | None = None) -> None:
    """Keep the node's containers until SIGTERM. boot: the node has just come up; `mark` is made when it is looked at.

    node: its name, where the state directory does not tell it.
    """
    log_to_stderr("keeper", log_level)
    run_loop(keep(state, boot=boot, node=node, mark=mark))


async def keep(state: Path, *, boot: bool, node: str = "", mark: Path | None = None) -> None:
    """The same in a process that does something else too."""
    while True:
        try:
            async with (
                wherry.connect(state=str(state), node=node) as client,
                # Before the look: what ends while the others are looked at is heard of.
                await client.bus.subscribe(node=client.bus.node, topic="/tasks/exit") as ends,
            ):
                keeper = Keeper(client)
                try:
                    await keeper.look(boot=boot)
                    boot = False
                    if mark is not None:
                        mark.touch()
                    await keeper.follow(ends)
                finally:
                    keeper.stop()
        except WherryError as e:  # an end may have been missed
            log.info("everything is looked at again: %s", e)
        except Exception:  # whatever it is, other services may live in this process
            log.exception("everything is looked at again")
        await asyncio.sleep(1.0)


class Keeper:
    """One task for each container that is to be started again."""

    def __init__(self, client: wherry.Client) -> None:
        self._client = client
        self._pauses: dict[Key, float] = {}
        self._started: dict[Key, float] = {}
        self._works: dict[Key, asyncio.Task[None]] = {}
        self._again: set[Key] = set()

    async def look(self, *, boot: bool) -> None:
        """Consider every container that has a policy."""
        for namespace in await walk(self._client.namespaces.walk):
            for record in await walk(self._client.within(namespace.name).containers.walk, spec=False):
                if policy_of(record.labels) is not None:
                    self._consider((namespace.name, record.id), boot=boot)

    async def follow(self, ends: AsyncIterable[Envelope]) -> None:
        """Consider each that ends. Unavailable, ResourceExhausted: some may have been missed."""
        async for end in ends:
            id = end.event.get("container_id")
            # Whoever has a namespace may publish what he likes in it.
            if isinstance(id, str) and id == end.event.get("id") and is_identifier(id):
                self._consider((end.namespace, id))

    def stop(self) -> None:
        self._again.clear()
        for work in self._works.values():
            work.cancel()

    def _consider(self, key: Key, *, boot: bool = False) -> None:
        if key in self._works:
            self._again.add(key)
            return
        work = self._works[key] = asyncio.get_running_loop().create_task(self._keep(key, boot=boot))
        work.add_done_callback(lambda _: self._kept(key))

    def _kept(self, key: Key) -> None:
        self._works.pop(key, None)
        if key in self._again:  # it ended before we had turned away
            self._again.discard(key)
            self._consider(key)

    async def _keep(self, key: Key, *, boot: bool) -> None:
        """Start it again, if that is to be; what was decided is looked at once more after the pause."""
        paused = False
        while True:
            try:
                container = await self._due(key, boot=boot)
                if container is None:
                    self._pauses.pop(key, None)
                    return
                if paused:
                    await self._start(key, container)
                    return
            except WherryError as e:
                log.warning("container %s in %s cannot be started again: %s", key[1], key[0], e)
            await asyncio.sleep(self._pause(key))
            paused = True

    def _pause(self, key: Key) -> float:
        steady = time.monotonic() - self._started.pop(key, time.monotonic()) > STEADY_SECONDS
        pause = PAUSE_FIRST if steady else self._pauses.get(key, PAUSE_FIRST)
        self._pauses[key] = min(pause * 2, PAUSE_MAX)
        return pause

    async def _due(self, key: Key, *, boot: bool) -> wherry.Container | None:
        """The container if it is to be started now."""
        client = self._client.within(key[0])
        try:
            container = await client.container(key[1])
        except NotFound:
            return None
        policy, status = policy_of(container.record.labels), None
        if policy is None:
            return None
        with contextlib.suppress(NotFound):
            state = await client.tasks.get(key[1])
            if state.status != "stopped":
                return None
            status = state.exit_status
        return container if policy.wants(container.record.labels, status, boot=boot) else None

    async def _start(self, key: Key, container: wherry.Container) -> None:
        count = count_of(container.record.labels) + 1
        await container.start(again=count)
        self._started[key] = time.monotonic()
        log.info("container %s in %s was started again, for the %d. time", key[1], key[0], count)
        while True:
            try:
                await self._heed(key)
                return
            except (Unavailable, DeadlineExceeded):
                await asyncio.sleep(1.0)

    async def _heed(self, key: Key) -> None:
        """Whoever stopped or removed it while it was being started found nothing that ran."""
        client = self._client.within(key[0])
        try:
            container = await client.container(key[1])
            if container.record.labels.get(STOPPED):
                await (await container.task()).stop()
        except NotFound:
            with contextlib.suppress(NotFound):
                await client.tasks.delete(key[1], "", True)
