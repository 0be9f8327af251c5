"""Live subscribers: each event once, and no hole that is not told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from housebus import PATIENCE, HouseServer
from wherry_shared.api.events import Envelope
from wherry_shared.bus import Bus, events, subjects
from wherry_shared.errors import Unavailable, WherryError


async def emit(bus: Bus, *numbers: int, namespace: str = "default") -> None:
    for n in numbers:
        envelope = Envelope(
            id=f"id-{n}", timestamp=datetime.now(UTC), namespace=namespace, topic="/images/create", event={"n": n}
        )
        bus.transport.publish(subjects.event("n1", namespace, "/images/create"), events.encode(envelope))
    await bus.transport.flush()


async def test_a_slow_subscriber_is_told_where_its_hole_is(image: Bus, places: Callable[[str], Awaitable[Bus]]) -> None:
    admin = await places("admin")
    async with await admin.subscribe(limit=10) as slow, await admin.subscribe() as quick:
        await emit(image, *range(25))
        await admin.transport.flush()
        assert [(await anext(slow)).event["n"] for _ in range(4)] == [0, 1, 2, 3]
        await emit(image, 25)  # there would be room for it, but it comes after the hole
        await admin.transport.flush()
        assert [(await anext(slow)).event["n"] for _ in range(6)] == list(range(4, 10))
        with pytest.raises(WherryError, match="too slow: 16 events missed"):
            await anext(slow)
        await emit(image, 26)
        assert (await anext(slow)).event["n"] == 26
        assert [(await anext(quick)).event["n"] for _ in range(27)] == list(range(27))


async def test_an_outage_is_a_hole_too(
    server: HouseServer, image: Bus, places: Callable[[str], Awaitable[Bus]]
) -> None:
    admin = await places("admin")
    async with await admin.subscribe() as subscriber:
        await emit(image, 1)
        await admin.transport.flush()
        server.nats.kill()
        server.nats.start()
        assert (await anext(subscriber)).event["n"] == 1
        with pytest.raises(Unavailable, match="events may have been missed"):
            await anext(subscriber)
        following = asyncio.ensure_future(anext(subscriber))
        async with asyncio.timeout(PATIENCE):
            number = 2
            while not following.done():
                with contextlib.suppress(WherryError):
                    await emit(image, number)
                number += 1
                await asyncio.sleep(0.05)
        assert (await following).event["n"] >= 2


async def test_one_event_is_seen_once_and_nonsense_never(image: Bus, places: Callable[[str], Awaitable[Bus]]) -> None:
    admin = await places("admin")
    async with await admin.subscribe() as subscriber:
        await emit(image, 1, 1, 2, 1, 2)
        for nonsense in (b"", b"{", b"[]", b"\xff", b'{"id": "x"}', b"null"):
            image.transport.publish("wherry.ev.v1.n1.default.images.create", nonsense)
        await emit(image, 3)
        assert [(await anext(subscriber)).event["n"] for _ in range(3)] == [1, 2, 3]


async def test_what_is_subscribed_to(image: Bus, places: Callable[[str], Awaitable[Bus]]) -> None:
    admin = await places("admin")
    async with (
        await admin.subscribe(namespace="k8s.io") as one,
        await admin.subscribe(topic="/images/create") as topic,
        await admin.subscribe(topic="/tasks/exit") as other,
        await admin.subscribe(node="n2") as elsewhere,
    ):
        await emit(image, 1, namespace="default")
        await emit(image, 2, namespace="k8s.io")
        assert (await anext(one)).event["n"] == 2
        assert [(await anext(topic)).event["n"] for _ in range(2)] == [1, 2]
        await admin.transport.flush()
        for nothing in (other, elsewhere):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(nothing), 0.05)
    bad: Any
    for bad in ({"topic": "images"}, {"topic": "/images/*"}, {"namespace": "a b"}, {"node": ">"}):
        with pytest.raises(WherryError):
            await admin.subscribe(**bad)


async def test_a_reader_comes_to_the_end_when_it_is_closed(image: Bus, places: Callable[[str], Awaitable[Bus]]) -> None:
    admin = await places("admin")
    subscriber = await admin.subscribe()
    seen: list[int] = []

    async def read() -> None:
        async for envelope in subscriber:
            seen.append(envelope.event["n"])

    reader = asyncio.ensure_future(read())
    await emit(image, 1, 2)
    async with asyncio.timeout(PATIENCE):
        while len(seen) < 2:
            await asyncio.sleep(0.01)
        await subscriber.close()
        await subscriber.close()
        await reader
    assert seen == [1, 2]
    assert admin.transport.on_state == []
