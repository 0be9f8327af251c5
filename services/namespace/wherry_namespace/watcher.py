"""What happens in a namespace makes it known: the events of the node, as they pass by."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from wherry_shared.bus import Bus, Subscriber, subjects
from wherry_shared.errors import WherryError

from .registry import Registry

log = logging.getLogger("wherry.namespace")

OWN = "/namespaces/"


class Watcher:
    """Tells the registry of each event's namespace. Its own events are left out: they would revive what was deleted."""

    def __init__(self, registry: Registry, bus: Bus) -> None:
        self._registry = registry
        self._bus = bus
        self._subscriber: Subscriber | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._subscriber = await self._bus.subscribe(node=self._bus.node, unwanted=self._is_known)
        self._task = asyncio.get_running_loop().create_task(self._watch(self._subscriber))

    async def stop(self) -> None:
        if self._subscriber is not None:
            await self._subscriber.close()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _is_known(self, subject: str) -> bool:
        """Whether the event of a subject tells nothing new: nearly all do, and there are many."""
        return self._registry.knows(subjects.namespace_of_event(subject))

    async def _watch(self, subscriber: Subscriber) -> None:
        while True:
            try:
                envelope = await anext(subscriber)
                if not envelope.topic.startswith(OWN):
                    await self._registry.seen(envelope.namespace, envelope.timestamp)
            except WherryError as e:
                # The next event of that namespace makes it known instead.
                log.warning("a namespace may not have been recorded: %s", e)
