"""What the rich client gives, in both of its forms: awaited, and entered."""

from __future__ import annotations

from datetime import datetime
from typing import assert_type

import wherry
from wherry_shared.api.events import Envelope
from wherry_shared.api.image import Image as Record
from wherry_shared.api.image import Images


async def connected() -> None:
    assert_type(await wherry.connect(), wherry.Client)
    async with wherry.connect(namespace="cpuguy") as client:
        assert_type(client, wherry.Client)
        assert_type(client.images, Images)
        assert_type(await client.images.get("redis"), Record)
    wherry.connect(namespace=1)  # type: ignore[arg-type]
    wherry.connect("cpuguy")  # type: ignore[call-arg]
    wherry.connect().pull("redis")  # type: ignore[attr-defined]


async def used(client: wherry.Client) -> None:
    image = await client.pull("docker.io/library/redis:alpine", unpack=True)
    assert_type(image, wherry.Image)
    await client.pull(1)  # type: ignore[arg-type]
    await client.pull("redis", unpacked=True)  # type: ignore[call-arg]

    assert_type(await client.new_container("redis", image), wherry.Container)
    async with (
        client.new_container("redis", image, args=["redis-server"]) as container,
        container.new_task(stdio=wherry.Stdio.output()) as task,
    ):
        assert_type(container, wherry.Container)
        assert_type(task, wherry.Task)
        await task.start()
        done = await task.run(["redis-cli", "ping"])
        assert_type(done, wherry.Completed)
        assert_type(done.stdout, bytes)
        assert_type((await task.wait()).code, int)
        await task.kill("TERM", all="yes")  # type: ignore[arg-type]
    assert_type(await container.new_task(), wherry.Task)
    container.new_task(stdio="null")  # type: ignore[arg-type]
    client.new_container("redis", "docker.io/library/redis")  # type: ignore[arg-type]
    assert_type(client.watch(since=datetime.now().astimezone()), wherry.Watch)
    async for event in client.watch(token="", filters=['topic=="/tasks/exit"']):
        assert_type(event, Envelope)
    async for told in client.list_and_watch(lambda: client.images.get("redis")):
        assert_type(told, wherry.Listed[Record] | Envelope)
    client.watch(since="10m")  # type: ignore[arg-type]


def errors() -> int:
    error: wherry.WherryError = wherry.NotFound("image 'redis': not found")
    assert_type(error.message, str)
    raise error
