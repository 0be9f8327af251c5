"""Bits that flip in the event stream's files: who reads on is told of a hole, and never given another event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from housebus import PATIENCE
from wherry import Client, Gap, Listed
from wherry_shared import context
from wherry_shared.api.events import Events
from wherry_shared.errors import OutOfRange, WherryError

from .half import Half

COUNT, READ = 300, 50


@pytest.fixture
def half(tmp_path: Path) -> Iterator[Half]:
    with Half(tmp_path, services=("events",)) as made:
        yield made


async def publish(events: Events, *numbers: int) -> None:
    """As soon as the server is there again."""
    for number in numbers:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    with context.use(key=f"event-{number}"):
                        await events.publish("/test/made", {"n": number, "padding": "x" * 500})
                    break
                except WherryError:
                    await asyncio.sleep(0.05)


async def read(events: Events, token: str = "", limit: int = 1000) -> tuple[list[int], str]:
    """One window, in which nothing may be missing."""
    window = await events.replay(token=token, limit=limit)
    assert window.gap is None
    return [envelope.event["n"] for envelope in window.events], window.token


async def read_on(events: Events, token: str = "") -> tuple[list[int], list[int]]:
    """To the end: the events, and the numbers in the stream that are told to be lost."""
    found: list[int] = []
    lost: list[int] = []
    more = True
    while more:
        window = await events.replay(token=token)
        if window.gap is not None:
            lost += range(window.gap.first, window.gap.last + 1)
        found += [envelope.event["n"] for envelope in window.events]
        token, more = window.token, window.more
    return found, lost


def damage(half: Half, place: str, *, index: bool, offset: int = 0) -> None:
    """One bit of the stream's block of messages; `index`: what the server knows of the block stays."""
    half.house.nats.kill()
    (block,) = half.house.nats.root.rglob("*.blk")
    for path in half.house.nats.root.rglob("index.db"):
        if not index:
            path.unlink()
    size = block.stat().st_size
    at = {"beginning": size // 100, "middle": size // 2, "end": size - 300}[place] + offset
    with block.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
    half.house.nats.start()


@pytest.mark.parametrize("place", ["beginning", "middle", "end"])
@pytest.mark.parametrize("index", [True, False], ids=["with index", "without index"])
async def test_a_flipped_bit_is_a_hole_that_is_told(half: Half, index: bool, place: str) -> None:
    """Nothing is missing that is not told: neither to who goes on from a token nor to who reads everything."""
    async with half.client() as client:
        await publish(client.events, *range(COUNT))
        told, token = await read(client.events, limit=READ)
        assert told == list(range(READ))
        damage(half, place, index=index)
        await publish(client.events, COUNT)
        again, lost = await read_on(client.events)
        assert again == sorted(set(again)) and again[-1] == COUNT, "the rest is there, in its order"
        try:
            following, lost_behind = await read_on(client.events, token)
        except OutOfRange:
            assert place != "middle"
        else:
            assert len(following) + len(lost_behind) == COUNT - READ + 1
            assert following == [n for n in again if n >= READ]
        state = await client.events.stream()
        if state.last == COUNT + 1:  # it was not cut: what is not there is told by its number
            assert sorted({n + 1 for n in again} | set(lost)) == list(range(state.first, COUNT + 2))
        watched, gaps = await watch(client)
        assert watched == again and bool(gaps) == bool(lost)


async def watch(client: Client) -> tuple[list[int], list[str]]:
    """The same as the client tells it."""
    found: list[int] = []
    gaps: list[str] = []
    watch = client.watch(follow=False)
    while True:
        try:
            found.append((await anext(watch)).event["n"])
        except Gap as gap:
            gaps.append(gap.message)
        except StopAsyncIteration:
            return found, gaps


@pytest.mark.parametrize("offset", [20, 100, 160, 400])
async def test_no_other_event_is_made_of_it(half: Half, offset: int) -> None:
    """nats-server hands out what it reads in the middle of its files: in headers, names or text a bit has flipped."""
    async with half.client() as client:
        await publish(client.events, *range(COUNT))
        before = {e.id: e for e in (await client.events.replay(limit=1000)).events}
        _, token = await read(client.events, limit=READ)
        damage(half, "middle", index=True, offset=offset)
        await publish(client.events, COUNT)
        found, lost = await read_on(client.events)
        assert found == sorted(set(found)) and found[-1] == COUNT
        if len(found) + len(lost) <= COUNT:  # it was noticed at the start, and all that follows was cut off
            with pytest.raises(OutOfRange):
                await read(client.events, token)
        for envelope in (await client.events.replay()).events:
            assert before.get(envelope.id, envelope) == envelope
        token = (await client.events.stream()).token
        await publish(client.events, COUNT + 1)
        assert (await read(client.events, token))[0] == [COUNT + 1]


async def test_a_stream_that_was_cut_and_grew_again_is_not_taken_for_the_old_one(half: Half) -> None:
    """Who follows the state reads it again then, and goes on with every event that is there."""
    async with half.client() as client:
        await publish(client.events, *range(COUNT))
        _, token = await read(client.events, limit=READ)
        listed: list[int] = []
        seen: list[int] = []
        last = COUNT + 3 * READ
        following = asyncio.ensure_future(_list_and_watch(client, listed, seen, until=last))
        await _until(lambda: bool(listed))
        damage(half, "beginning", index=True)
        await publish(client.events, *range(COUNT, COUNT + 2 * READ))
        with pytest.raises(OutOfRange):
            await read(client.events, token)
        await _until(lambda: len(listed) > 1)  # the state is read again
        await publish(client.events, *range(COUNT + 2 * READ, last + 1))
        async with asyncio.timeout(PATIENCE):
            await following
        assert seen[-READ:] == list(range(last + 1 - READ, last + 1))


async def test_a_cut_end_is_noticed_by_a_service_that_was_down_too(half: Half) -> None:
    """The numbers after the cut are given again; who comes from before it meets no hole, and is told all the same."""
    async with half.client() as client:
        await publish(client.events, *range(COUNT))
        _, token = await read(client.events, limit=READ)
        mark = half.root / "events/mark"
        await _until(lambda: mark.exists() and json.loads(mark.read_text())[1] == COUNT)
        half.kill("events")
        damage(half, "end", index=True)
        half.start("events")
        await publish(client.events, COUNT)
        with pytest.raises(OutOfRange, match="lost events"):
            await read(client.events, token)
        epoch = (await client.events.stream()).epoch
        half.kill("events")
        half.start("events")
        assert (await client.events.stream()).epoch == epoch, "told once"


async def _list_and_watch(client: Client, listed: list[int], seen: list[int], *, until: int) -> None:
    async def state() -> int:
        return len(seen)

    async for told in client.list_and_watch(state):
        if isinstance(told, Listed):
            listed.append(told.state)
        else:
            seen.append(told.event["n"])
            if told.event["n"] == until:
                return


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)
