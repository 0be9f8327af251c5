"""Events published until the stream has them, one or many at once; and what it says of those that it has not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from housebus import PATIENCE, HouseServer
from wherry_shared.bus import Bus, credentials, events
from wherry_shared.bus.protocol import Message
from wherry_shared.bus.transport import EventLog
from wherry_shared.errors import InvalidArgument, PermissionDenied, Unavailable
from wherry_shared.memory import MemoryTransport
from wherry_shared.outbox import Outbox
from wherry_shared.sqlite import Database


async def test_the_stream_takes_an_id_once(image: Bus, stream: EventLog) -> None:
    subject = "wherry.ev.v1.n1.default.images.create"
    numbers = [await events.publish(image.transport, events.Outgoing(subject, b"{}", i)) for i in "ababc"]
    assert numbers == [1, 2, 1, 2, 3]
    assert (await stream.state()).last == 3


async def test_many_at_once_are_stored_in_order_up_to_the_first_that_is_refused(image: Bus, stream: EventLog) -> None:
    subject = "wherry.ev.v1.n1.default.images.create"
    made = [events.Outgoing(subject, f"{{{i}}}".encode(), f"id-{i}") for i in range(300)]
    assert await events.publish_all(image.transport, made) == (300, None)
    assert [entry.data for entry in await stream.read()] == [event.data for event in made]
    refused = events.Outgoing("wherry.ev.v1.n2.default.images.create", b"{}", "elsewhere")
    later = [made[0]._replace(id="a"), refused, made[1]._replace(id="b")]
    taken, error = await events.publish_all(image.transport, later)
    assert taken == 1
    assert isinstance(error, PermissionDenied | Unavailable)


@pytest.mark.parametrize(
    ("ack", "number"),
    [
        (b'{"stream":"S", "seq":7}', 7),
        (b'{"stream":"S","seq":7,"duplicate": true}', 7),
        (b'{"stream":"S", "domain":"leaf", "seq":7}', 7),
        (b'{"seq": 7, "later": [1], "stream": "S"}', 7),
        (b'{"error":{"code":503,"description":"maximum messages exceeded"},"stream":"S","seq":0}', "refused .*maximum"),
        (b'{"stream":"S","seq":0}', "refused the event"),
        (b'{"error":{"code":503,"description":"no"},"stream":"S"}', "refused the event: .*no"),
        (b'{"seq": 1e999}', "refused the event"),
        (b'{"seq": null}', "refused the event"),
        (b"[7]", "refused the event"),
        (b"[" * 100_000, "cannot be read"),
        (b"+OK", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_what_the_stream_says_of_an_event(ack: bytes, number: int | str) -> None:
    message = Message("x", ack)
    if isinstance(number, int):
        assert events.number_of(message) == number
    else:
        with pytest.raises(Unavailable, match=number):
            events.number_of(message)


def outgoing(*ids: str, data: bytes = b"{}") -> list[events.Outgoing]:
    return [events.Outgoing("wherry.ev.v1.n1.default.images.create", data, id) for id in ids]


async def test_a_batch_is_told_why_its_first_is_not_in_the_stream(
    server: HouseServer, image: Bus, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def why(made: list[events.Outgoing], reason: str) -> int:
        taken, error = await events.publish_all(image.transport, made)
        assert isinstance(error, Unavailable)
        assert reason in error.message
        return taken

    assert await events.publish_all(image.transport, []) == (0, None)
    assert await why(outgoing(*"abc"), "no stream takes events") == 0
    await log.ensure(max_age=3600, max_bytes=1 << 24)
    big = outgoing("big", data=b"x" * (2 << 20))
    taken, error = await events.publish_all(image.transport, [*outgoing(*"de"), *big, *outgoing("f")])
    assert (taken, type(error)) == (2, InvalidArgument)
    server.nats.freeze()
    monkeypatch.setattr(events, "ACK_TIMEOUT", 0.2)
    assert await why(outgoing(*"gh"), "did not acknowledge an event within 0.2 s") == 0
    monkeypatch.setattr(events, "ACK_TIMEOUT", 2 * PATIENCE)
    asked = asyncio.ensure_future(why(outgoing(*"ij"), "dropped"))
    await asyncio.sleep(0.05)
    server.nats.kill()
    async with asyncio.timeout(PATIENCE):
        assert await asked == 0
    assert await why(outgoing("k"), "not connected") == 0


async def test_a_batch_on_the_bus_in_memory() -> None:
    bus = Bus(MemoryTransport(), node="n1")
    taken, error = await events.publish_all(bus.transport, outgoing(*"abc"))
    assert (taken, str(error)) == (0, "no stream takes events: the events service is not up")
    log = bus.transport.event_log("events", "wherry.ev.v1.n1.>")
    assert await events.publish_all(bus.transport, outgoing(*"abca")) == (4, None)
    assert (await log.state()).last == 3
    assert await events.publish(bus.transport, outgoing("b")[0]) == 2


async def test_a_batch_that_nobody_waits_for_any_more(server: HouseServer, image: Bus, stream: EventLog) -> None:
    server.nats.freeze()
    asked = asyncio.ensure_future(events.publish_all(image.transport, outgoing(*"abc")))
    await asyncio.sleep(0.05)
    asked.cancel()
    server.nats.thaw()
    assert await events.publish_all(image.transport, outgoing("d")) == (1, None)
    assert (await stream.state()).last == 4


async def test_what_the_stream_refuses_stays_in_the_outbox(
    server: HouseServer, image: Bus, log: EventLog, tmp_path: Path
) -> None:
    """nats-server answers a number to what it does not store, too: on a full disk, say."""
    operator, name = await server.operator(), credentials.stream_name("n1")
    full = {"name": name, "subjects": ["wherry.ev.v1.n1.>"], "max_msgs": 3, "discard": "new", "allow_direct": True}
    await operator.request(f"$JS.API.STREAM.CREATE.{name}", json.dumps(full).encode(), timeout=5)
    database = await Database.open(tmp_path / "things.db", ())
    outbox = Outbox(database, image)
    outbox.start()
    for n in range(5):
        await database.write(lambda tx, n=n: tx.publish("/images/create", {"n": n}, namespace="k8s.io"))
    async with asyncio.timeout(PATIENCE):
        while (await log.state()).last < 3:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)  # the fourth is tried meanwhile
    assert database.one("SELECT count(*) FROM outbox")[0] >= 2
    assert (await log.state()).last == 3
    await operator.request(f"$JS.API.STREAM.UPDATE.{name}", json.dumps({**full, "max_msgs": 9}).encode(), timeout=5)
    async with asyncio.timeout(PATIENCE):
        while database.one("SELECT count(*) FROM outbox")[0]:
            await asyncio.sleep(0.01)
    assert [envelope.event["n"] for entry in await log.read() if (envelope := events.decode(entry.data))] == [*range(5)]
    await outbox.stop()
    await database.close()
    await operator.close()
