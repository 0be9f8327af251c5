"""A proxy is typed as its contract, and calls of it are checked like any other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import assert_type

from wherry_shared.api.content import Content, Info
from wherry_shared.api.image import Image, Images
from wherry_shared.bus import Bus
from wherry_shared.values import Page


async def typed(bus: Bus) -> None:
    content = bus.proxy(Content)
    assert_type(content, Content)
    assert_type(await content.info("sha256:" + "a" * 64), Info)
    assert_type(await content.read("sha256:" + "a" * 64, 0, 10), bytes)
    images = bus.proxy(Images, node="n1", namespace="default")
    assert_type(images, Images)
    assert_type(await images.get("redis"), Image)
    assert_type(await images.walk(filters=["name==redis"], limit=10), Page[Image])
    assert_type(await images.delete("redis", target=""), None)


async def wrong(bus: Bus) -> None:
    content, images = bus.proxy(Content), bus.proxy(Images)
    await content.info(1)  # type: ignore[arg-type]
    await content.info()  # type: ignore[call-arg]
    await content.read("sha256:", offset="0")  # type: ignore[arg-type]
    await content.nothing()  # type: ignore[attr-defined]
    await images.create("redis")  # type: ignore[arg-type]
    await images.walk(filters="name==redis", limit=None)  # type: ignore[arg-type]
    name: int = (await images.get("redis")).name  # type: ignore[assignment]
    (await images.get("redis")).nothing  # type: ignore[attr-defined]  # noqa: B018
    Image(name="redis")  # type: ignore[call-arg]
    bus.proxy(Content, namespace=name, instance=None)  # type: ignore[arg-type]


async def events(bus: Bus) -> AsyncIterator[str]:
    async with await bus.subscribe(topic="/tasks/exit") as subscriber:
        async for event in subscriber:
            yield event.topic
            event.topics  # type: ignore[attr-defined]  # noqa: B018
