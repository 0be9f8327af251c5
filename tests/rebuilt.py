"""What the suites of services share: the stream of their events and what was told there, a power cut for what asks
which boot it is, and a house to build again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import pytest
from housebus import PATIENCE
from wherry_shared.bus import Bus, Subscriber, subjects
from wherry_shared.bus.credentials import stream_name
from wherry_shared.bus.transport import EventLog


async def event_stream(bus: Bus) -> EventLog:
    """The node's stream of events, as its owner makes it."""
    log = bus.transport.event_log(stream_name(bus.node), f"{subjects.EV}.{bus.node}.>")
    await log.ensure(max_age=3600, max_bytes=1 << 24)
    return log


async def told(events: Subscriber, count: int) -> list[tuple[str, str, dict[str, Any]]]:
    """The next events: namespace, topic and event of each."""
    async with asyncio.timeout(PATIENCE):
        seen = [await anext(events) for _ in range(count)]
    return [(e.namespace, e.topic, e.event) for e in seen]


def power_of(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Callable[[], None]:
    """What cuts the power for a module that asks for `boot_id`: from then on it is another boot."""
    boots = itertools.count()

    def cut() -> None:
        boot = f"boot-{next(boots)}"
        monkeypatch.setattr(module, "boot_id", lambda: boot)

    cut()
    return cut


class House:
    """Services on a bus and a root, that can be stopped and built again there: `async with` starts and stops it."""

    def __init__(self, bus: Bus, root: Path) -> None:
        self.bus, self.root = bus, root

    async def start(self) -> None:
        """Build the services and serve them."""
        raise NotImplementedError

    async def stop(self) -> None:
        """End all that `start` began."""
        raise NotImplementedError

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def __aenter__(self) -> Self:
        await event_stream(self.bus)
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()
