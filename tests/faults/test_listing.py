"""threats 40: ten thousand containers on record, a few of which run: what is listed costs what is shown."""

from __future__ import annotations

import asyncio
import sqlite3
import time

import pytest
import wherry
from node import Node
from wherry.client import walk
from wherry.spec import Options, User, make
from wherry_shared.api.container import Container, Runtime
from wherry_shared.contract import pack

RECORDS, RUNNING = 10_000, 500


def fill(node: Node, namespace: str) -> None:
    """Records as the service writes them, at once; through the bus their events would take a while."""
    record = Container(id="x", runtime=Runtime(name="crun"), spec=make("x", None, Options(args=["true"]), User()))
    rows = []
    for number in range(RECORDS):
        id = f"r{number:05}"
        rows.append((namespace, id, pack(record.model_copy(update={"id": id}).model_dump(exclude_defaults=True))))
    database = sqlite3.connect(node.root / "container/metadata.db", timeout=30)
    with database:
        database.executemany("INSERT INTO records (namespace, key, record) VALUES (?, ?, ?)", rows)
    database.close()


async def asked(client: wherry.Client) -> dict[str, int]:
    """What the container service has answered until now."""
    (service,) = [each for each in await client.introspection.services() if each.name == "container"]
    return {endpoint.name: endpoint.requests for endpoint in service.endpoints}


def _ps(node: Node, namespace: str) -> float:
    started = time.monotonic()
    node.run("ps", "-n", namespace)
    return time.monotonic() - started


@pytest.mark.timeout(600)
async def test_ps_among_ten_thousand(node: Node, busybox_ref: str, namespace: str) -> None:
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        image = await client.pull(busybox_ref, unpack=True)

        async def one(id: str) -> None:
            await (await (await client.new_container(id, image, args=["sleep", "1000"])).new_task()).start()

        ids = [f"run{number:03}" for number in range(RUNNING)]
        for start in range(0, RUNNING, 4):
            await asyncio.gather(*(one(id) for id in ids[start : start + 4]))
        await asyncio.to_thread(fill, node, namespace)
        before = await asked(client)
        rows = await asyncio.to_thread(node.json, "ps", "-n", namespace)
        assert [row["id"] for row in rows] == ids
        # What does not run is not even read.
        after = await asked(client)
        assert (after["walk"] - before["walk"], after["get"] - before["get"]) == (0, RUNNING)
        seconds: list[float] = []
        while len(seconds) < 20 and min(seconds, default=9.9) >= 1.0:  # others may be at work on this machine
            seconds.append(await asyncio.to_thread(_ps, node, namespace))
        assert min(seconds) < 1.0, seconds
        # While all are read, some go and one comes: each of the others is there, once and in order.
        reading = asyncio.create_task(walk(client.containers.walk))
        for number in range(0, 200, 2):
            await client.containers.delete(f"r{number:05}")
        found = [container.id for container in await reading]
        assert found == sorted(set(found))
        kept = {f"r{number:05}" for number in range(RECORDS) if number % 2 or number >= 200} | set(ids)
        assert kept <= set(found)
        for id in ids:
            await (await (await client.container(id)).task()).delete(force=True)
            await (await client.container(id)).delete(snapshot=True)
        assert await asyncio.to_thread(node.json, "ps", "-n", namespace) == []
