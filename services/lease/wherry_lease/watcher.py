"""Deletions in other services, as they pass by on the bus: hints that a collection may find something.

One is enough until the next collection: then it listens no more, so that it costs nothing where much is deleted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from wherry_shared.bus import Bus, subjects
from wherry_shared.bus.credentials import DELETIONS
from wherry_shared.bus.transport import Message, Subscription
from wherry_shared.errors import WherryError

log = logging.getLogger("wherry.lease.gc")

REST_SECONDS = 0.2


class Watcher:
    """Calls `on_deletion` for a deletion, and for the next no earlier than a moment later.

    every: for each of them, since they are counted.
    """

    def __init__(self, bus: Bus, on_deletion: Callable[[], None], *, every: bool = False) -> None:
        self._bus = bus
        self._on_deletion = on_deletion
        self._every = every
        self._subscriptions: list[Subscription] = []
        self._seen = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._listen()
        self._task = asyncio.get_running_loop().create_task(self._rest())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._end()

    async def _listen(self) -> None:
        root = f"{subjects.EV}.{subjects.encode_token(self._bus.node, 'node')}.*"
        for topic in DELETIONS:
            subject = root + topic.replace("/", ".")
            self._subscriptions.append(await self._bus.transport.subscribe(subject, self._on_message))

    async def _end(self) -> None:
        while self._subscriptions:
            await self._subscriptions.pop().unsubscribe()

    def _on_message(self, message: Message) -> None:
        if self._every or not self._seen.is_set():
            self._on_deletion()
        self._seen.set()

    async def _rest(self) -> None:
        """After a deletion, hear nothing for a moment: what comes meanwhile is found by the look that follows."""
        while not self._every:
            await self._seen.wait()
            try:
                await self._end()
                await asyncio.sleep(REST_SECONDS)
                await self._listen()
            except WherryError as e:
                log.info("deletions are not heard of, and looked for: %s", e)
                return
            self._seen.clear()
            self._on_deletion()
