"""What the doctor says of the stream of events: whole, with holes, and not there."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from faults.half import Half
from housebus import NODE, PATIENCE
from wherry import Client
from wherry.doctor import afar
from wherry.doctor.findings import Finding, Patient
from wherry_shared import context
from wherry_shared.bus.credentials import stream_name
from wherry_shared.errors import Unavailable


async def test_holes_are_found_and_counted(tmp_path: Path) -> None:
    with Half(tmp_path, services=("events",)) as half:
        async with half.client() as client:
            await publish(client, 30)
            assert await look(client) == []
            await lose(half, 3, 4, 17)
            (found,) = await look(client)
            assert (found.severity, found.what) == ("broken", "the stream of events has lost 3 events")
            assert found.why == "their numbers: 3 to 4, 17 to 17"


async def test_a_stream_that_is_gone(tmp_path: Path) -> None:
    with Half(tmp_path, services=("events",)) as half:
        async with half.client() as client:
            await publish(client, 1)
            await ask(half, f"STREAM.DELETE.{stream_name(NODE)}")
            (found,) = await look(client)
            assert (found.severity, found.what) == ("broken", "the stream of events cannot be read")


async def look(client: Client) -> list[Finding]:
    with context.use(timeout=20.0):
        return list(await afar.events(Patient(client, None)))


async def publish(client: Client, count: int) -> None:
    for number in range(count):
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await client.events.publish("/test/made", {"n": number})
                    break
                except Unavailable:  # the service is still starting
                    await asyncio.sleep(0.05)


async def lose(half: Half, *numbers: int) -> None:
    for number in numbers:
        await ask(half, f"STREAM.MSG.DELETE.{stream_name(NODE)}", {"seq": number})


async def ask(half: Half, verb: str, body: object = None) -> None:
    operator = await half.house.operator()
    try:
        data = json.dumps(body).encode() if body is not None else b""
        answer = json.loads((await operator.request(f"$JS.API.{verb}", data, timeout=5.0)).data)
        assert answer["success"], answer
    finally:
        await operator.close()
