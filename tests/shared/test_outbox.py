"""Events on their way from a service's database into the stream: none lost, none twice, in order, of their time."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from housebus import PATIENCE, HouseServer
from rebuilt import power_of
from wherry_events.journal import Journal
from wherry_events.kept import Kept
from wherry_events.metadata import MIGRATIONS, Rows
from wherry_events.service import EventsService
from wherry_shared import outbox as outbox_module
from wherry_shared import sqlite
from wherry_shared.api.events import Envelope, Replay
from wherry_shared.bus import Bus, events
from wherry_shared.bus.transport import EventLog
from wherry_shared.errors import Unavailable, WherryError
from wherry_shared.memory import MemoryTransport
from wherry_shared.outbox import BATCH, Outbox
from wherry_shared.sqlite import Database, Transaction

SCHEMA = ("CREATE TABLE things (n INTEGER PRIMARY KEY)",)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = await Database.open(tmp_path / "things.db", SCHEMA)
    yield made
    await made.close()


@pytest.fixture
async def outbox(database: Database, image: Bus) -> AsyncIterator[Outbox]:
    """Not started."""
    made = Outbox(database, image)
    yield made
    await made.stop(0.1)


def change(n: int) -> Callable[[Transaction], None]:
    def write(tx: Transaction) -> None:
        tx.execute("INSERT INTO things VALUES (?)", (n,))
        tx.publish("/images/create", {"n": n}, namespace="k8s.io")

    return write


async def write(database: Database, *numbers: int) -> None:
    await asyncio.gather(*(database.write(change(n)) for n in numbers))


def left(database: Database) -> int:
    return int(database.one("SELECT count(*) FROM outbox")[0])


async def drained(database: Database) -> None:
    async with asyncio.timeout(PATIENCE):
        while left(database):
            await asyncio.sleep(0.01)


async def stored(log: EventLog) -> list[Envelope]:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                found = [events.decode(entry.data) for entry in await log.read(limit=1000)]
                break
            except WherryError:  # the server has just started
                await asyncio.sleep(0.05)
    assert None not in found
    return [e for e in found if e is not None]


def numbers(envelopes: list[Envelope]) -> list[int]:
    return [e.event["n"] for e in envelopes]


async def test_events_leave_in_order_and_are_forgotten(database: Database, outbox: Outbox, stream: EventLog) -> None:
    outbox.start()
    before = datetime.now(UTC)
    await write(database, *range(300))
    await drained(database)
    found = await stored(stream)
    assert numbers(found) == list(range(300))
    assert len({e.id for e in found}) == 300
    assert {(e.namespace, e.topic, e.node) for e in found} == {("k8s.io", "/images/create", "n1")}
    assert all(before <= e.timestamp <= datetime.now(UTC) for e in found)
    assert (await stream.read(limit=1))[0].subject == "wherry.ev.v1.n1.k8s~io.images.create"


async def test_what_is_not_durable_yet_is_synced_by_the_next_write_or_soon(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes: list[None] = []
    flush = database._flush_log
    monkeypatch.setattr(database, "_flush_log", lambda: (flushes.append(None), flush())[1])
    await database.write(change(1))
    await database.settle()
    assert not flushes
    monkeypatch.setattr(sqlite, "SETTLE_SECONDS", 60)  # however slow this machine is, the write below comes in time
    await database.write(change(2), durable=False)
    waits = asyncio.ensure_future(database.settle())
    await asyncio.sleep(0)
    await database.write(change(3), durable=False)
    assert not waits.done()
    await database.write(change(4))
    await waits
    assert not flushes
    monkeypatch.setattr(sqlite, "SETTLE_SECONDS", 0.005)
    await database.write(change(5), durable=False)
    await database.settle()
    await database.settle()
    assert len(flushes) == 1


async def test_who_wrote_an_event_goes_on_before_it_leaves(
    database: Database, outbox: Outbox, stream: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the answer has a way through tasks, as that of a snapshot's removal has."""
    order: list[str] = []
    publish_all = events.publish_all

    async def published(transport: Any, outgoing: Any) -> Any:
        order.append("left")
        return await publish_all(transport, outgoing)

    monkeypatch.setattr(events, "publish_all", published)
    outbox.start()
    await write(database, 0)
    await drained(database)
    order.clear()
    await asyncio.shield(asyncio.ensure_future(database.write(change(1))))
    order.append("answered")
    await drained(database)
    assert order == ["answered", "left"]


async def test_a_crash_between_the_commit_and_the_publish(
    tmp_path: Path, server: HouseServer, image: Bus, stream: EventLog
) -> None:
    program = f"""
import asyncio, os, signal
from pathlib import Path
from wherry_shared.sqlite import Database

async def main():
    database = await Database.open(Path({str(tmp_path / "things.db")!r}), {SCHEMA!r})
    for n in range(3):
        def write(tx):
            tx.execute("INSERT INTO things VALUES (?)", (n,))
            tx.publish("/images/create", {{"n": n}}, namespace="k8s.io")
        await database.write(write)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    for _ in range(2):  # the next process, and the one after it
        database = await Database.open(tmp_path / "things.db", SCHEMA)
        outbox = Outbox(database, image)
        outbox.start()
        await drained(database)
        await outbox.stop()
        await database.close()
    assert numbers(await stored(stream)) == [0, 1, 2]


async def test_nobody_hears_of_a_change_before_who_made_it(
    outbox: Outbox, database: Database, stream: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a service answers of a process may come from memory: it is told that it ended when that is known there."""
    answered = database._settle
    held: asyncio.Future[tuple[Any, int]] = asyncio.get_running_loop().create_future()

    outbox.start()
    await write(database, 0)
    await drained(database)
    monkeypatch.setattr(database, "_settle", lambda *written: held.set_result(written))
    writing = asyncio.create_task(write(database, 1))
    written = await held
    outbox._wake.set()  # as by one before it
    await asyncio.sleep(0.2)
    assert left(database) == 1 and not writing.done() and numbers(await stored(stream)) == [0]
    monkeypatch.setattr(database, "_settle", answered)
    answered(*written)
    await writing
    await drained(database)
    assert numbers(await stored(stream)) == [0, 1]


async def test_a_crash_between_the_publish_and_the_forgetting(
    tmp_path: Path, image: Bus, stream: EventLog, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(self: Any) -> None:
        raise Unavailable("the process is gone")

    with monkeypatch.context() as m:
        m.setattr(Outbox, "_put_aside", crash)
        first = Outbox(database, image)
        first.start()
        await write(database, 0, 1, 2)
        async with asyncio.timeout(PATIENCE):
            while (await stream.state()).last < 3:
                await asyncio.sleep(0.01)
        await first.stop(0.1)
    assert left(database) == 3
    second = Outbox(database, image)
    second.start()
    await write(database, 3)
    await drained(database)
    await second.stop()
    assert numbers(await stored(stream)) == [0, 1, 2, 3]
    assert (await stream.state()).last == 4  # the stream knew them by their ids


async def test_the_bus_is_killed_and_comes_back(
    server: HouseServer, database: Database, outbox: Outbox, stream: EventLog, image: Bus
) -> None:
    outbox.start()
    await write(database, 0)
    await drained(database)
    server.nats.kill()
    when: list[datetime] = []
    for n in range(1, 40):
        await write(database, n)
        when.append(datetime.now(UTC))
    assert left(database) == 39
    await asyncio.sleep(0.3)
    back = datetime.now(UTC)
    server.nats.start()
    await drained(database)
    found = await stored(stream)
    assert numbers(found) == list(range(40))
    assert all(e.timestamp <= at < back for e, at in zip(found[1:], when, strict=True))
    assert [e.timestamp for e in found] == sorted(e.timestamp for e in found)


async def test_the_bus_is_killed_in_the_middle(
    server: HouseServer, database: Database, outbox: Outbox, stream: EventLog
) -> None:
    """Some are stored and not acknowledged, some are not: in the end each is there once, in order."""
    outbox.start()
    for kill in range(3):
        writes = asyncio.ensure_future(write(database, *range(kill * 300, kill * 300 + 300)))
        while (await stream.state()).last <= kill * 300:
            await asyncio.sleep(0)
        server.nats.kill()
        await writes
        server.nats.start()
        await drained(database)
        await stored(stream)
    found = await stored(stream)
    assert sorted(numbers(found)) == list(range(900))
    assert len({e.id for e in found}) == 900
    assert numbers(found) == list(range(900))


async def test_a_stream_that_is_not_there_yet(
    database: Database, outbox: Outbox, log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    outbox.start()
    with caplog.at_level("INFO"):
        await write(database, *range(50))
        async with asyncio.timeout(PATIENCE):
            while "events wait in the outbox: no stream takes events" not in caplog.text:
                await asyncio.sleep(0.01)
        assert left(database) == 50
        await log.ensure(max_age=3600, max_bytes=1 << 24)
        await drained(database)
    assert numbers(await stored(log)) == list(range(50))


async def test_stopping_sends_what_is_left(database: Database, outbox: Outbox, stream: EventLog) -> None:
    await write(database, *range(200))
    outbox.start()
    await outbox.stop()
    await outbox.stop()
    assert left(database) == 0
    assert numbers(await stored(stream)) == list(range(200))


async def test_stopping_without_a_bus_leaves_it_for_the_next(
    server: HouseServer, database: Database, outbox: Outbox, stream: EventLog, image: Bus
) -> None:
    outbox.start()
    server.nats.kill()
    await write(database, 0, 1)
    await outbox.stop(0.2)
    assert left(database) == 2
    server.nats.start()
    following = Outbox(database, image)
    following.start()
    await drained(database)
    await following.stop()
    assert numbers(await stored(stream)) == [0, 1]


async def test_nothing_ends_the_relay(
    database: Database, outbox: Outbox, stream: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_all, troubles = events.publish_all, iter([ValueError("odd"), KeyError("x"), Unavailable("no")])

    async def troubled(*arguments: Any) -> Any:
        trouble = next(troubles, None)
        if trouble is not None:
            raise trouble
        return await publish_all(*arguments)

    await write(database, *range(20))
    monkeypatch.setattr(events, "publish_all", troubled)
    outbox.start()
    await drained(database)
    assert next(troubles, None) is None
    assert numbers(await stored(stream)) == list(range(20))


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Cuts the power: from then on it is another boot."""
    return power_of(monkeypatch, outbox_module)


async def relayed(database: Database, bus: Bus, *numbers: int) -> None:
    """What one process does with some writes, from its start to its end."""
    outbox = Outbox(database, bus)
    outbox.start()
    await write(database, *numbers)
    await drained(database)
    await outbox.stop()


async def test_what_the_power_took_from_the_stream_goes_into_it_again(
    server: HouseServer, database: Database, stream: EventLog, image: Bus, power: Callable[[], None], tmp_path: Path
) -> None:
    """nats-server acknowledges before it syncs: what its files had at some moment before the cut is what is left."""
    store = server.nats.root / "jetstream"
    await relayed(database, image, *range(5))
    server.nats.stop()
    shutil.copytree(store, tmp_path / "synced")
    server.nats.start()
    await stored(stream)
    await relayed(database, image, *range(5, 9))
    server.nats.kill()
    shutil.rmtree(store)
    shutil.copytree(tmp_path / "synced", store)
    server.nats.start()
    assert numbers(await stored(stream)) == list(range(5))
    power()
    await relayed(database, image, 9)
    assert numbers(await stored(stream)) == list(range(10))


async def test_nothing_goes_again_while_the_power_is_on(
    database: Database, stream: EventLog, places: Callable[[str], Awaitable[Bus]], image: Bus
) -> None:
    heard: list[bytes] = []
    admin = await places("admin")
    await admin.transport.subscribe("wherry.ev.v1.>", lambda message: heard.append(message.data))
    await relayed(database, image, 0, 1)
    await relayed(database, image, 2)
    await admin.transport.flush()
    assert len(heard) == 3


async def test_what_the_stream_knows_no_more_by_its_id_is_looked_for(
    database: Database, stream: EventLog, places: Callable[[str], Awaitable[Bus]], image: Bus,
    power: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """The power was off for longer than the stream's window of duplicates: it would take each event a second time."""
    await relayed(database, image, *range(4))
    await relayed(database, image, 4)
    power()
    monkeypatch.setattr(outbox_module, "KNOWN_SECONDS", 0)
    sent: list[str] = []
    send = events.send
    monkeypatch.setattr(events, "send", lambda bus, event, answer: sent.append(event.id) or send(bus, event, answer))
    kept = await Database.open(tmp_path / "events.db", MIGRATIONS)
    own = await places("events")
    await own.serve(EventsService(Journal(stream, own, Kept(Rows(kept)))))
    await relayed(database, image, 5)
    assert len(sent) == 1
    assert numbers(await stored(stream)) == list(range(6))
    await kept.close()


async def test_what_was_sent_and_not_put_aside_is_looked_for_batch_by_batch(
    database: Database, stream: EventLog, places: Callable[[str], Awaitable[Bus]], image: Bus,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """The power took the moves to `sent`, which are not synced: more than a batch lies in the outbox, and was sent."""
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "_put_aside", lambda self: asyncio.sleep(0))
        outbox = Outbox(database, image)
        outbox.start()
        await write(database, *range(2 * BATCH + 5))
        async with asyncio.timeout(PATIENCE):
            while (await stream.state()).last < 2 * BATCH + 5:
                await asyncio.sleep(0.01)
        await outbox.stop()
    monkeypatch.setattr(outbox_module, "KNOWN_SECONDS", 0)
    sent: list[str] = []
    asked = 0
    publish_all = events.publish_all

    async def noted(transport: Any, batch: list[events.Outgoing]) -> tuple[int, WherryError | None]:
        sent.extend(event.id for event in batch)
        return await publish_all(transport, batch)

    class Counted(EventsService):
        async def replay(self, *args: Any, **kwargs: Any) -> Replay:
            nonlocal asked
            asked += not kwargs["token"]
            return await super().replay(*args, **kwargs)

    monkeypatch.setattr(events, "publish_all", noted)
    kept = await Database.open(tmp_path / "events.db", MIGRATIONS)
    own = await places("events")
    await own.serve(Counted(Journal(stream, own, Kept(Rows(kept)))))
    await write(database, *range(2 * BATCH + 5, 6 * BATCH))
    await relayed(database, image)
    assert len(sent) == len(set(sent)) == 4 * BATCH - 5
    assert numbers(await stored(stream)) == list(range(6 * BATCH))
    assert asked == 4, "behind a batch of which nothing is there nobody asks"
    await kept.close()


async def test_what_is_surely_on_the_streams_disk_is_kept_no_longer(
    database: Database, stream: EventLog, image: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(database, image)
    outbox.start()
    await write(database, *range(5))
    await drained(database)
    assert database.one("SELECT count(*) FROM sent")[0] == 5
    monkeypatch.setattr(outbox_module, "KEEP_SECONDS", 0.2)  # only now: the five may have been put aside one by one
    await asyncio.sleep(0.3)
    await write(database, 5)
    await drained(database)
    assert [row[0] for row in database.all("SELECT seq FROM sent")] == [6]
    await outbox.stop()


async def test_an_event_that_is_not_durable_yet_does_not_leave(
    database: Database, stream: EventLog, image: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the stream tells must not be undone by a power cut."""
    synced = 0

    def fdatasync(fd: int) -> None:
        nonlocal synced
        assert os.readlink(f"/proc/self/fd/{fd}").endswith("things.db-wal")
        assert left(database) == 1
        synced += 1

    outbox = Outbox(database, image)
    outbox.start()
    await write(database, 0)
    await drained(database)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    await database.write(change(1), durable=False)
    await drained(database)
    assert synced == 1
    await outbox.stop()


async def test_in_memory_too(database: Database) -> None:
    bus = Bus(MemoryTransport(), node="n1")
    log = bus.transport.event_log("s", "wherry.ev.v1.n1.>")
    await log.ensure(max_age=1, max_bytes=1)
    outbox = Outbox(database, bus)
    outbox.start()
    await write(database, *range(10))
    await drained(database)
    await outbox.stop()
    assert [json.loads(s.data)["event"]["n"] for s in await log.read()] == list(range(10))
    await bus.close()


async def test_a_crowd_gathers_and_what_comes_alone_leaves_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    publish_all = events.publish_all
    pause, pauses, gathered = asyncio.sleep, list[float](), asyncio.Event()

    async def noted(transport: Any, outgoing: Any) -> Any:
        batches.append(len(outgoing))
        return await publish_all(transport, outgoing)

    async def sleep(seconds: float) -> None:
        if not seconds:
            return await pause(0)
        pauses.append(seconds)
        await gathered.wait()

    monkeypatch.setattr(events, "publish_all", noted)
    monkeypatch.setattr(outbox_module, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    bus = Bus(MemoryTransport(), node="n1")
    await bus.transport.event_log("s", "wherry.ev.v1.n1.>").ensure(max_age=1, max_bytes=1)
    outbox = Outbox(database, bus)
    outbox.start()
    await write(database, 0)
    await drained(database)
    crowd = outbox_module.CROWD
    await database.write(lambda tx: [change(n)(tx) for n in range(1, crowd + 1)])
    async with asyncio.timeout(PATIENCE):
        while not pauses:
            await asyncio.sleep(0.001)
    for n in range(crowd + 1, crowd + 6):
        await write(database, n)
    assert batches == [1, crowd]
    gathered.set()
    await drained(database)
    assert batches == [1, crowd, 5]
    gathered.clear()  # who waits from here on waits for ever
    await write(database, 100)
    async with asyncio.timeout(PATIENCE):
        while batches[3:] != [1]:
            await asyncio.sleep(0.001)
    assert set(pauses) == {outbox_module.GATHER}
    await outbox.stop()
    await bus.close()
