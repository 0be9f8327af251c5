"""A watcher sees every event once, also around a bus that died under it."""

from __future__ import annotations

import asyncio
import os
import signal

import wherry
from node import Node
from wherry_shared import context
from wherry_shared.errors import WherryError


async def test_a_watcher_outlives_the_bus(node: Node, namespace: str) -> None:
    async with (
        wherry.connect(state=str(node.state), namespace=namespace) as watching,
        wherry.connect(state=str(node.state), namespace=namespace) as acting,
    ):
        seen: list[int] = []

        async def read() -> None:
            async for envelope in watching.watch(filters=['topic=="/test/count"']):
                seen.append(envelope.event["number"])
                if len(seen) == 20:
                    return

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.2)
        for number in range(20):
            if number == 10:
                os.kill(node.pids()["nats-server"], signal.SIGKILL)
            await _publish(acting, number)
        async with asyncio.timeout(30):
            await reader
    assert sorted(seen) == list(range(20)) and len(set(seen)) == 20


async def _publish(client: wherry.Client, number: int) -> None:
    for _ in range(200):
        try:
            with context.use(key=f"{client.namespace}-{number}"):  # tried twice, it is one event
                await client.events.publish("/test/count", {"number": number})
        except WherryError:
            await asyncio.sleep(0.05)
        else:
            return
    raise AssertionError("the bus does not come back")
