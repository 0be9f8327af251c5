"""Watching as a client does: from a place into the present, however slow, and on after any time away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from housebus import NODE, PATIENCE, HouseBus, HouseServer
from wherry import Client, Gap, Listed, Watch
from wherry.client import Address
from wherry_events.journal import Journal
from wherry_events.kept import Kept
from wherry_events.metadata import MIGRATIONS, Rows
from wherry_events.service import EventsService
from wherry_shared.bus import subjects
from wherry_shared.bus.credentials import stream_name
from wherry_shared.bus.stream import JetStreamLog
from wherry_shared.errors import FailedPrecondition, InvalidArgument
from wherry_shared.sqlite import Database


async def log_of(bus: HouseBus) -> JetStreamLog:
    return JetStreamLog((await bus.of("events")).transport, stream_name(NODE), f"{subjects.EV}.{NODE}.>")


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    with HouseServer(tmp_path / "bus") as server:
        bus = await server.bus()
        own, log = await bus.of("events"), await log_of(bus)
        await log.ensure(max_age=3600, max_bytes=1 << 20)
        database = await Database.open(tmp_path / "events.db", MIGRATIONS)
        await bus.serve(EventsService(Journal(log, own, Kept(Rows(database)))))
        async with Client(bus, "default", Address(server.nats.url, NODE, server.creds, tmp_path)) as made:
            yield made
        await database.close()


async def publish(client: Client, *numbers: int, topic: str = "/test/made", padding: int = 0) -> None:
    for number in numbers:
        await client.events.publish(topic, {"n": number, "padding": "x" * padding})


async def take(watch: Watch, count: int) -> list[int]:
    async with asyncio.timeout(PATIENCE):
        return [(await anext(watch)).event["n"] for _ in range(count)]


async def rest(watch: Watch) -> list[int]:
    async with asyncio.timeout(PATIENCE):
        return [envelope.event["n"] async for envelope in watch]


async def has_begun(*watches: Watch) -> None:
    """Until each knows where it begins, which is what somebody's first look at it brings about: now."""
    async with asyncio.timeout(PATIENCE):
        while not all(watch.token for watch in watches):
            await asyncio.sleep(0.001)


async def test_from_now_on_in_the_order_of_the_stream(client: Client) -> None:
    await publish(client, 0)
    async with client.watch() as watch, client.watch(filters=["event.n==3"]) as one:
        heard = asyncio.ensure_future(take(watch, 30)), asyncio.ensure_future(take(one, 1))
        await has_begun(watch, one)
        await asyncio.gather(*(publish(client, n) for n in range(1, 31)))
        order = [e.event["n"] for e in (await client.events.replay()).events]
        assert await heard[0] == order[1:]
        assert await heard[1] == [3]


async def test_the_past_goes_over_into_the_present(client: Client) -> None:
    before = datetime.now(UTC) - timedelta(hours=1)
    writing = asyncio.ensure_future(publish(client, *range(200)))
    await asyncio.sleep(0.05)
    async with client.watch(since=before) as watch:
        assert await take(watch, 200) == list(range(200))
    await writing


async def test_on_after_hours_away(client: Client) -> None:
    """Whatever the process was, its token is enough; also in the middle of a window, and with other filters."""
    await publish(client, *range(5))
    async with client.watch(follow=False) as watch:
        assert await take(watch, 2) == [0, 1]
        token = watch.token
    await publish(client, 5, 6)
    assert await rest(client.watch(token=token, follow=False)) == [2, 3, 4, 5, 6]
    async with client.watch(token=token, filters=["event.n==4", "event.n==7"]) as watch:
        assert await take(watch, 1) == [4]
        await publish(client, 7)
        assert await take(watch, 1) == [7]
        assert watch.token == (await client.events.stream()).token


async def test_a_slow_reader_misses_nothing(client: Client) -> None:
    async with client.watch() as slow:
        first = asyncio.ensure_future(take(slow, 1))
        await has_begun(slow)
        for start in range(0, 2000, 100):
            await asyncio.gather(*(publish(client, n) for n in range(start, start + 100)))
        assert sorted(await first + await take(slow, 1999)) == list(range(2000))


async def test_what_expired_is_told_and_the_rest_comes(client: Client) -> None:
    async with client.watch(since=datetime.now(UTC) - timedelta(hours=1)) as watch:
        await publish(client, 0)
        assert await take(watch, 1) == [0]
        await publish(client, *range(1, 40), padding=50_000)  # the stream has a mebibyte
        with pytest.raises(Gap, match="no longer kept"):
            await take(watch, 1)
        kept = [e.event["n"] for e in (await client.events.replay()).events]
        first = await take(watch, 1)
        assert first[0] == kept[0] > 1
        assert await take(watch, 39 - first[0]) == list(range(first[0] + 1, 40))


async def test_behind_a_gap_nothing_is_told_that_came_before(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of which a crash took the end is another one, and has most of its events still."""
    monkeypatch.setattr("wherry.watch._HEARD_MAX", 10)
    await publish(client, *range(30))
    await asyncio.sleep(0.02)
    async with client.watch() as watch, client.watch(since=datetime.now(UTC) - timedelta(hours=1)) as old:
        assert await take(old, 30) == list(range(30))
        first = asyncio.ensure_future(take(watch, 1))
        await has_begun(watch)
        await publish(client, 30)
        assert await first == await take(old, 1) == [30]
        assert isinstance(client.bus, HouseBus)
        await (await log_of(client.bus)).renew()
        await publish(client, 31)
        for one in (watch, old):
            with pytest.raises(Gap):
                await take(one, 1)
            assert await take(one, 1) == [31]


async def test_what_was_told_before_one_listens_and_stored_after_one_looked(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-server hands an event out before its stream has it: who comes in between hears nothing of it."""
    monkeypatch.setattr("wherry.watch._Ear._on_message", lambda ear, message: None)
    for soon in (0.5, 5.0, 50.0):
        monkeypatch.setattr("wherry_shared.bus.events.ACK_TIMEOUT", soon)
        async with client.watch() as watch:
            began = time.monotonic()
            first = asyncio.ensure_future(take(watch, 1))
            await has_begun(watch)
            await publish(client, 0)
            if time.monotonic() - began < soon:  # a machine that took longer than that has shown nothing
                assert await first == [0]
                return
            first.cancel()
    raise AssertionError("nothing was published in time")


async def test_until(client: Client) -> None:
    await publish(client, 0)
    async with client.watch(since=datetime.now(UTC) - timedelta(hours=1), until=datetime.now(UTC)) as past:
        assert await rest(past) == [0]
    for seconds in (0.5, 5, 50):
        over = datetime.now(UTC) + timedelta(seconds=seconds)
        async with client.watch(until=over) as soon:
            heard = asyncio.ensure_future(rest(soon))
            await has_begun(soon)
            await publish(client, 1)
            if datetime.now(UTC) < over:  # a machine that took longer than that has shown nothing
                assert await heard == [1]
                break
            heard.cancel()
    else:
        raise AssertionError("nothing was published in time")
    await publish(client, 2)


async def test_the_state_and_what_happens_to_it(client: Client) -> None:
    """Between the two nothing is lost: what happens while the state is read is told afterwards."""
    count = 0

    async def state() -> int:
        nonlocal count
        await publish(client, count)
        count += 1
        return count

    told = client.list_and_watch(state)
    async with asyncio.timeout(PATIENCE):
        listed = await anext(told)
        assert isinstance(listed, Listed) and listed.state == 1
        during = await anext(told)
        assert not isinstance(during, Listed) and during.event["n"] == 0


async def test_what_is_no_filter(client: Client) -> None:
    with pytest.raises(InvalidArgument):
        client.watch(filters=["topic=x"])


async def test_nobody_waits_for_a_client_that_is_closed(client: Client) -> None:
    """Nor does who waits already when it is closed."""

    async def listed() -> None:
        async for _ in client.list_and_watch(client.events.stream):
            begun.set()

    begun = asyncio.Event()
    watch = client.watch()
    waiting = [asyncio.ensure_future(anext(watch)), asyncio.ensure_future(listed())]
    async with asyncio.timeout(20):
        await begun.wait()
        while not watch.token:
            await asyncio.sleep(0.01)
        await client.close()
        for each in waiting:
            with pytest.raises(FailedPrecondition, match="closed"):
                await each
        for later in (anext(client.watch()), listed(), client.events.stream()):
            with pytest.raises(FailedPrecondition, match="closed"):
                await later
