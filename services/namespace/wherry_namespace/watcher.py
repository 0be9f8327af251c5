"""What comes into being in a namespace makes it known: the events of that, as they pass by or were missed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from datetime import datetime

from wherry_shared.bus import Bus, events, subjects
from wherry_shared.bus.credentials import CREATIONS
from wherry_shared.bus.transport import Message, Subscription
from wherry_shared.errors import WherryError

from .missed import Missed
from .registry import Registry

# After a look at what was missed that failed; and now and then, so that the next process has not much to look at.
PAUSE, LOOK = 2.0, 3600.0

log = logging.getLogger("wherry.namespace")


class Watcher:
    """Tells the registry of each creation's namespace. Of other events, which are many, it hears nothing."""

    def __init__(self, registry: Registry, bus: Bus, missed: Missed) -> None:
        self._registry = registry
        self._missed = missed
        self._look_at = 0.0  # the loop's time of the next look at what was missed
        self._bus = bus
        self._subscriptions: list[Subscription] = []
        self._heard: dict[str, datetime] = {}  # by namespace: the last event, of those that are to be told
        self._more = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        root = f"{subjects.EV}.{subjects.encode_token(self._bus.node, 'node')}.*"
        for topic in CREATIONS:
            subject = root + topic.replace("/", ".")
            self._subscriptions.append(await self._bus.transport.subscribe(subject, self._on_message))
        self._bus.transport.on_state.append(self._on_state)
        self._task = asyncio.get_running_loop().create_task(self._tell())

    async def stop(self) -> None:
        if self._on_state in self._bus.transport.on_state:
            self._bus.transport.on_state.remove(self._on_state)
        while self._subscriptions:
            await self._subscriptions.pop().unsubscribe()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _on_state(self, connected: bool) -> None:
        """Others may have told of something before we were there again."""
        if connected:
            self._look_at = 0.0
            self._more.set()

    def _on_message(self, message: Message) -> None:
        if self._registry.knows(subjects.namespace_of_event(message.subject)):
            return
        envelope = events.decode(message.data)
        if envelope is not None:
            self._heard[envelope.namespace] = envelope.timestamp
            self._more.set()

    async def _tell(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._look_at):
                    await self._more.wait()
            self._more.clear()
            if self._look_at <= now():
                self._look_at = now() + LOOK
                await self._look()
            while self._heard:
                name = next(iter(self._heard))
                try:
                    await self._registry.seen(name, self._heard.pop(name))
                except WherryError as e:
                    log.warning("namespace %s was not recorded: %s", name, e)
                    self._look_at = now() + PAUSE

    async def _look(self) -> None:
        try:
            await self._missed.look()
        except WherryError as e:
            log.info("what was missed is looked at again: %s", e)
            self._look_at = asyncio.get_running_loop().time() + PAUSE
