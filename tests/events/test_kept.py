"""What callers published stays published, also when the power takes from the stream what was not synced yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from housebus import NODE, PATIENCE, HouseServer
from rebuilt import event_stream, power_of
from wherry_events import kept as kept_module
from wherry_events.journal import Journal
from wherry_events.kept import Kept
from wherry_events.metadata import MIGRATIONS, Rows
from wherry_shared import outbox
from wherry_shared.bus import Bus, events, subjects
from wherry_shared.bus.credentials import stream_name
from wherry_shared.bus.transport import EventLog
from wherry_shared.errors import Unavailable
from wherry_shared.memory import MemoryLog, MemoryTransport
from wherry_shared.sqlite import Database


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HouseServer]:
    with HouseServer(tmp_path / "bus") as made:
        yield made


@pytest.fixture
async def bus(server: HouseServer) -> AsyncIterator[Bus]:
    made = await server.connect("events")
    yield made
    await made.transport.close()


@pytest.fixture
async def log(bus: Bus) -> EventLog:
    return await event_stream(bus)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = await Database.open(tmp_path / "events.db", MIGRATIONS)
    yield made
    await made.close()


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Cuts the power: from then on it is another boot."""
    return power_of(monkeypatch, kept_module)


async def topics(log: EventLog) -> list[str]:
    return [envelope.topic for entry in await log.read() if (envelope := events.decode(entry.data)) is not None]


async def publish(log: EventLog, bus: Bus, database: Database, *topics: str) -> None:
    """What one process does, from its start on."""
    kept = Kept(Rows(database))
    await kept.restore(log, bus.transport)
    for topic in topics:
        await Journal(log, bus, kept).publish("default", topic, {})


async def test_what_the_power_took_is_published_again_and_what_it_left_is_not(
    log: EventLog, bus: Bus, database: Database, power: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish(log, bus, database, "/a", "/b", "/c")
    read = log.read

    async def cut(**arguments: object) -> object:
        return (await read(**arguments))[:1] if "since" in arguments else []  # type: ignore[arg-type]

    power()
    sent: list[str] = []
    send = events.publish

    async def noted(transport: object, event: events.Outgoing) -> int:
        sent.append(event.subject.rpartition(".")[2])
        return await send(transport, event)  # type: ignore[arg-type]

    with monkeypatch.context() as m:
        m.setattr(events, "publish", noted)
        m.setattr(log, "read", cut)
        await Kept(Rows(database)).restore(log, bus.transport)
    assert sent == ["b", "c"]
    assert await topics(log) == ["/a", "/b", "/c"], "and the stream knew them by their ids, as it happens"
    sent.clear()
    await publish(log, bus, database, "/d")
    assert sent == []
    assert await topics(log) == ["/a", "/b", "/c", "/d"]


async def test_what_is_surely_on_the_streams_disk_is_kept_no_longer(
    log: EventLog, bus: Bus, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(Rows(database))
    journal = Journal(log, bus, kept)
    monkeypatch.setattr(outbox, "KEEP_SECONDS", 60.0)
    for _ in range(3):
        await journal.publish("default", "/a", {})
    assert database.one("SELECT count(*) FROM kept")[0] == 3
    monkeypatch.setattr(outbox, "KEEP_SECONDS", 0.05)
    monkeypatch.setattr(kept_module, "FORGET_SECONDS", 0.05)
    await asyncio.sleep(0.1)
    await journal.publish("default", "/a", {})
    assert [row[0] for row in database.all("SELECT seq FROM kept")] == [4]


async def test_what_the_stream_refuses_is_kept_no_longer_than_its_caller_waits(
    bus: Bus, database: Database, power: Callable[[], None]
) -> None:
    """It is written while the stream takes it; what that refuses must not come back after a power cut."""
    log = bus.transport.event_log(stream_name(NODE), f"{subjects.EV}.{NODE}.>")
    journal = Journal(log, bus, Kept(Rows(database)))
    for _ in range(2):
        with pytest.raises(Unavailable, match="no stream takes events"):
            await journal.publish("default", "/refused", {})
        assert database.all("SELECT seq FROM kept") == []
    await log.ensure(max_age=3600, max_bytes=1 << 24)
    told = await asyncio.gather(*(journal.publish("default", f"/taken.{n}", {}) for n in range(40)))
    assert len(told) == 40
    assert len(database.all("SELECT seq FROM kept")) == 40
    power()
    await Kept(Rows(database)).restore(log, bus.transport)
    assert await topics(log) == [f"/taken.{n}" for n in range(40)]


async def test_a_caller_that_gives_up_while_the_stream_is_silent(
    log: EventLog, bus: Bus, database: Database, server: HouseServer
) -> None:
    journal = Journal(log, bus, Kept(Rows(database)))
    server.nats.freeze()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await journal.publish("default", "/silent", {})
    others = [asyncio.ensure_future(journal.publish("default", f"/later.{n}", {})) for n in range(3)]
    await asyncio.sleep(0.1)
    assert not any(other.done() for other in others), "the stream has not got them"
    server.nats.thaw()
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*others)
    assert len(await topics(log)) == len(database.all("SELECT seq FROM kept")) == 4


async def test_what_is_refused_at_once_is_told_at_once(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "ACK_TIMEOUT", 10.0 * PATIENCE)  # it is not what they wait for
    bus = Bus(MemoryTransport(), node=NODE)
    journal = Journal(MemoryLog("elsewhere", "x.>"), bus, Kept(Rows(database)))
    async with asyncio.timeout(PATIENCE):
        for _ in range(2):
            with pytest.raises(Unavailable, match="no stream takes events"):
                await journal.publish("default", "/refused", {})
    assert database.all("SELECT seq FROM kept") == []
