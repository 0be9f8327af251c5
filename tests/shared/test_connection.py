"""Connection against a real nats-server: publish, subscribe, ask, JetStream, the end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import nats.js.api
import pytest
from natsd import NatsServer, make_key
from wherry_shared.bus.connection import Connection, Message, NoResponders, check_version
from wherry_shared.bus.transport import Message as AnyMessage
from wherry_shared.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)

Connect = Callable[..., Awaitable[Connection]]


async def echo(connection: Connection, subject: str, *, queue: str = "") -> None:
    """Answer each request on `subject` with its own bytes and headers."""

    def answer(message: AnyMessage) -> None:
        connection.publish(message.reply, message.data, headers=message.headers)

    await connection.subscribe(subject, answer, queue=queue)


async def test_request_and_reply_with_headers(shared_server: NatsServer, connect: Connect) -> None:
    service, client = await connect(shared_server), await connect(shared_server)
    await echo(service, "echo")
    answer = await client.request(
        "echo", b"hello", headers={"Trace": "1", "Empty": "", "Ü".encode().hex(): "ü"}, timeout=5
    )
    assert isinstance(answer, Message)
    assert (answer.data, answer.reply) == (b"hello", "")
    assert answer.headers == {"Trace": "1", "Empty": "", "c39c": "ü"}
    assert answer.subject.startswith("_INBOX.test.")
    assert (await client.request("echo", b"", timeout=5)).headers is None


async def test_what_the_connection_says_of_itself(shared_server: NatsServer, connect: Connect) -> None:
    connection = await connect(shared_server)
    assert connection.connected
    assert connection.client_url == shared_server.url
    assert connection.server_version.startswith("2.")
    assert connection.max_payload == 1 << 20
    assert connection.inbox_prefix == "_INBOX.test"


async def test_nobody_listens(shared_server: NatsServer, connect: Connect) -> None:
    client = await connect(shared_server)
    with pytest.raises(NoResponders, match="nobody listens on nobody"):
        await client.request("nobody.here", b"", timeout=60)
    assert issubclass(NoResponders, Unavailable)
    assert not client._waiting


async def test_deadline_and_the_late_answer(shared_server: NatsServer, connect: Connect) -> None:
    client = await connect(shared_server)
    asked: list[AnyMessage] = []
    await client.subscribe("slow", asked.append)
    with pytest.raises(DeadlineExceeded, match="slow was not answered in time"):
        await client.request("slow", b"", timeout=0.05)
    await client.flush()  # it may have taken its way there for longer than that
    client.publish(asked[0].reply, b"too late")
    await client.flush()
    assert not client._waiting
    await echo(client, "quick")
    assert (await client.request("quick", b"next", timeout=5)).data == b"next"


async def test_a_deadline_that_has_passed_sends_nothing(shared_server: NatsServer, connect: Connect) -> None:
    client = await connect(shared_server)
    asked: list[AnyMessage] = []
    await client.subscribe("never", asked.append)
    with pytest.raises(DeadlineExceeded):
        await client.request("never", b"", timeout=0)
    await client.flush()
    assert not asked


async def test_cancelling_forgets_the_request(shared_server: NatsServer, connect: Connect) -> None:
    client = await connect(shared_server)
    asked: list[AnyMessage] = []
    await client.subscribe("stuck", asked.append)
    task = asyncio.create_task(client.request("stuck", b"", timeout=60))
    while not asked:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not client._waiting
    client.publish(asked[0].reply, b"late")
    await client.flush()


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 70_000, (1 << 20) - 200, 1 << 20])
async def test_payload_sizes(shared_server: NatsServer, connect: Connect, size: int) -> None:
    service, client = await connect(shared_server), await connect(shared_server)
    await echo(service, "echo")
    data = os.urandom(size)
    assert (await client.request("echo", data, timeout=10)).data == data


async def test_many_large_payloads_with_back_pressure(shared_server: NatsServer, connect: Connect) -> None:
    sender, receiver = await connect(shared_server), await connect(shared_server)
    chunks = [os.urandom(1 << 20) for _ in range(4)]
    got, total = hashlib.sha256(), 60
    sent, done = hashlib.sha256(), asyncio.Event()
    count = 0

    def take(message: AnyMessage) -> None:
        nonlocal count
        got.update(message.data)
        count += 1
        if count == total:
            done.set()

    await receiver.subscribe("bulk", take)
    for number in range(total):
        await sender.writable()
        chunk = chunks[number % 4]
        sent.update(chunk)
        sender.publish("bulk", chunk)
    await asyncio.wait_for(done.wait(), 60)
    assert got.digest() == sent.digest()


async def test_over_the_servers_limit(shared_server: NatsServer, connect: Connect) -> None:
    client = await connect(shared_server)
    with pytest.raises(InvalidArgument, match="exceed"):
        client.publish("big", bytes((1 << 20) + 1))
    with pytest.raises(InvalidArgument, match="exceed"):
        client.publish("big", bytes(1 << 20), headers={"A": "b"})
    await client.flush()
    assert client.connected


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB x 0\r\n", "a\n", "a\tb", "a\x00b", "a\u2028b", "a\udc80"])
async def test_malformed_subjects(shared_server: NatsServer, connect: Connect, subject: str) -> None:
    client = await connect(shared_server)
    with pytest.raises(InvalidArgument):
        client.publish(subject, b"")
    with pytest.raises(InvalidArgument):
        await client.request(subject, b"", timeout=1)
    if subject:
        with pytest.raises(InvalidArgument):
            client.publish("fine", b"", reply=subject)
    with pytest.raises(InvalidArgument):
        client.publish("fine", b"", headers={"A": "x\r\nB: y"})
    assert not client._waiting


@pytest.mark.parametrize(("subject", "queue"), [("", ""), ("a..b", ""), ("a b", ""), (">.a", ""), ("a", "q\r\nx")])
async def test_malformed_subscriptions(shared_server: NatsServer, connect: Connect, subject: str, queue: str) -> None:
    client = await connect(shared_server)
    with pytest.raises(InvalidArgument):
        await client.subscribe(subject, lambda message: None, queue=queue)


async def test_a_thousand_at_once(shared_server: NatsServer, connect: Connect) -> None:
    service, client = await connect(shared_server), await connect(shared_server)
    await echo(service, "echo")
    answers = await asyncio.gather(*(client.request("echo", b"%d" % n, timeout=30) for n in range(1000)))
    assert [int(answer.data) for answer in answers] == list(range(1000))
    assert not client._waiting


async def test_order_is_kept_between_small_and_large(shared_server: NatsServer, connect: Connect) -> None:
    client = await connect(shared_server)
    sizes: list[int] = []
    await client.subscribe("order", lambda message: sizes.append(len(message.data)))
    wanted = [10, 100_000, 20, 300_000, 0, 40, 1 << 20, 50]
    for size in wanted:
        client.publish("order", bytes(size))
    await client.flush()
    assert sizes == wanted


async def test_queue_groups_share(shared_server: NatsServer, connect: Connect) -> None:
    client = await connect(shared_server)
    shares: Counter[str] = Counter()

    def member(name: str) -> Callable[[AnyMessage], None]:
        def take(message: AnyMessage) -> None:
            shares[name] += 1

        return take

    for name in ("a", "b"):
        await client.subscribe("work", member(name), queue="workers")
    await client.subscribe("work", member("everything"))
    for _ in range(200):
        client.publish("work", b"")
    await client.flush()
    assert shares["a"] + shares["b"] == shares["everything"] == 200
    assert shares["a"] and shares["b"]


async def test_a_failing_callback_harms_nobody(
    shared_server: NatsServer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    client = await connect(shared_server)
    seen: list[bytes] = []

    def fail(message: AnyMessage) -> None:
        seen.append(message.data)
        raise RuntimeError("a bug in the callback")

    await client.subscribe("fails", fail)
    client.publish("fails", b"1")
    client.publish("fails", b"2")
    await client.flush()
    assert seen == [b"1", b"2"]
    assert "a bug in the callback" in caplog.text
    assert client.connected


async def test_unsubscribe_and_drain_of_one_subscription(shared_server: NatsServer, connect: Connect) -> None:
    client, sender = await connect(shared_server), await connect(shared_server)
    seen: list[bytes] = []
    first = await client.subscribe("end", lambda message: seen.append(message.data))
    sender.publish("end", b"1")
    await sender.flush()
    await first.drain()
    assert seen == [b"1"], "what the server had already sent is delivered"
    second = await client.subscribe("end", lambda message: seen.append(message.data))
    await second.unsubscribe()
    await second.unsubscribe()
    sender.publish("end", b"2")
    await sender.flush()
    await client.flush()
    assert seen == [b"1"]
    assert not client._link.callbacks.keys() - {"1"}, "only the inbox is left"


async def test_drain_lets_requests_finish_and_closes(shared_server: NatsServer, connect: Connect) -> None:
    service, client = await connect(shared_server), await connect(shared_server)
    asked: list[AnyMessage] = []
    await service.subscribe("ask", asked.append)
    seen: list[bytes] = []
    await client.subscribe("news", lambda message: seen.append(message.data))
    request = asyncio.create_task(client.request("ask", b"", timeout=30))
    while not asked:
        await asyncio.sleep(0.005)
    service.publish("news", b"before")
    await service.flush()
    draining = asyncio.create_task(client.drain())
    with pytest.raises(NoResponders):
        while True:  # until the server has taken the subscription back
            with contextlib.suppress(DeadlineExceeded):
                await service.request("news", b"after", timeout=0.1)
    service.publish(asked[0].reply, b"answer")
    assert (await request).data == b"answer"
    await draining
    assert seen[0] == b"before"
    assert not client.connected
    with pytest.raises(FailedPrecondition):
        client.publish("x", b"")


async def test_close_sends_what_was_published_and_fails_what_waits(shared_server: NatsServer, connect: Connect) -> None:
    observer, client = await connect(shared_server), await connect(shared_server)
    seen: list[bytes] = []
    await observer.subscribe("last.words", lambda message: seen.append(message.data))
    await observer.subscribe("silent", lambda message: None)
    request = asyncio.create_task(client.request("silent", b"", timeout=30))
    await asyncio.sleep(0)
    states: list[bool] = []
    client.on_state.append(states.append)
    client.publish("last.words", b"bye")
    await client.close()
    await client.close()
    with pytest.raises(Unavailable):
        await request
    while not seen:
        await observer.flush()
    assert seen == [b"bye"]
    assert states == [False], "who waits for something to come is told that nothing will"
    for call in (client.flush(), client.writable(), client.subscribe("x", print), client.request("x", b"", timeout=1)):
        with pytest.raises(FailedPrecondition, match="closed"):  # unlike an outage, nobody is to wait for its end
            await call


async def test_names_that_are_not_text_do_not_end_the_connection(shared_server: NatsServer, connect: Connect) -> None:
    """nats-server lets any byte but blanks and line ends through, so a hostile neighbour may send this."""
    client = await connect(shared_server)
    seen: list[AnyMessage] = []
    await client.subscribe("odd.>", seen.append)
    reader, writer = await asyncio.open_connection("127.0.0.1", shared_server.port)
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
    for subject in (b"odd.\xff\xfe", b"odd.\x0b", b"odd.\xc2\xa0\xc2\x85"):
        writer.write(b"PUB %b %b 1\r\nx\r\n" % (subject, b"re\x0bply"))
        writer.write(b"HPUB %b 6 7\r\n\xff\x00::\r\nx\r\n" % subject)
    writer.write(b"PING\r\n")
    while await reader.readline() != b"PONG\r\n":
        pass
    writer.close()
    await client.flush()
    assert len(seen) == 6
    assert all(message.data == b"x" for message in seen)
    assert [message.headers for message in seen] == [None, {}] * 3
    assert client.connected


async def test_a_publisher_that_never_waits_is_stopped(nats_server: NatsServer, connect: Connect) -> None:
    client = await connect(nats_server)
    nats_server.freeze()
    with pytest.raises(ResourceExhausted, match="writable"):
        for _ in range(200):
            client.publish("flood", bytes(1 << 20))
    assert not client._link.room.is_set()
    nats_server.thaw()
    await asyncio.wait_for(client.writable(), 30)
    await client.flush(30)


async def test_flush_of_a_silent_server(nats_server: NatsServer, connect: Connect) -> None:
    client = await connect(nats_server)
    nats_server.freeze()
    with pytest.raises(DeadlineExceeded):
        await client.flush(0.1)
    nats_server.thaw()
    await client.flush()
    await client.flush()


async def test_jetstream_over_the_same_connection(shared_server: NatsServer, connect: Connect) -> None:
    client = await connect(shared_server)
    await echo(client, "echo")
    stream = f"EV{os.urandom(4).hex()}"
    jetstream = client.jetstream()
    await jetstream.add_stream(nats.js.api.StreamConfig(name=stream, subjects=[f"{stream}.>"]))
    ack = await jetstream.publish(f"{stream}.a", b"1", headers={"Nats-Msg-Id": "one"})
    again = await jetstream.publish(f"{stream}.a", b"1", headers={"Nats-Msg-Id": "one"})
    assert (ack.seq, again.seq, again.duplicate) == (1, 1, True)
    for number in range(2, 51):
        await jetstream.publish(f"{stream}.a", b"%d" % number)
    pull = await jetstream.pull_subscribe(f"{stream}.>", durable="reader")
    pulled = await pull.fetch(50, timeout=10)
    for message in pulled:
        await message.ack_sync()
    assert [int(message.data) for message in pulled] == list(range(1, 51))
    ordered = await jetstream.subscribe(f"{stream}.>", ordered_consumer=True)
    pushed = [await ordered.next_msg(timeout=10) for _ in range(50)]
    assert [int(message.data) for message in pushed] == list(range(1, 51))
    assert (await client.request("echo", b"still quick", timeout=5)).data == b"still quick"
    await ordered.unsubscribe()
    await jetstream.delete_stream(stream)


async def test_the_event_log_over_the_connection(shared_server: NatsServer, connect: Connect) -> None:
    client = await connect(shared_server)
    root = f"ev{os.urandom(4).hex()}"
    log = client.event_log(root, f"{root}.>")
    with pytest.raises(Unavailable):
        await log.state()
    await log.ensure(max_age=3600, max_bytes=1 << 20)
    await log.ensure(max_age=7200, max_bytes=1 << 20)
    for number in (1, 2, 2, 3):
        ack = await client.request(f"{root}.a", b"%d" % number, headers={"Nats-Msg-Id": str(number)}, timeout=10)
        assert b'"seq":%d' % number in ack.data
    stored = await log.read(after=1)
    assert [(event.sequence, event.subject, event.data) for event in stored] == [
        (2, f"{root}.a", b"2"),
        (3, f"{root}.a", b"3"),
    ]
    assert (await log.state()).last == 3
    await client.jetstream().delete_stream(root)


async def test_an_old_server_is_refused_before_credentials_leave(connect: Connect) -> None:
    heard = bytearray()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version": "2.9.10", "headers": true, "max_payload": 1048576, "nonce": "abc"}\r\n')
        heard.extend(await reader.read())
        writer.close()

    listener = await asyncio.start_server(greet, "127.0.0.1", 0)
    url = f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    with pytest.raises(FailedPrecondition, match=r"2\.9\.10 is too old.*2\.12\.7.*2\.14\.0"):
        await Connection.connect([url], name="test", inbox_prefix="_INBOX.test")
    listener.close()
    await listener.wait_closed()
    assert bytes(heard) == b""


async def test_a_server_that_lets_everybody_in_is_refused(tmp_path: Path) -> None:
    """Who has a seed would not be asked for it there, and whoever has none could say to be him."""
    with NatsServer(tmp_path) as server, pytest.raises(FailedPrecondition, match="asks nobody for an nkey"):
        await Connection.connect([server.url], name="x", inbox_prefix="_INBOX.x", seed=make_key().seed)


@pytest.mark.parametrize(
    "version", ["2.12.7", "2.12.8-beta.1", "2.12.19", "2.14.0", "2.14.1-RC.1", "2.15.1", "3.0.0", "v2.14.0"]
)
def test_versions_that_will_do(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize(
    "version",
    [
        "",
        "2",
        "x",
        "2.9.10",
        "2.12.6",
        "2.12.7-RC.1",
        "2.13.0",
        "2.13.9",
        "2.13.0-RC.1",
        "2.14.0-RC.2",
        "1.99.99",
        "2.14.0x",
    ],
)
def test_versions_that_will_not_do(version: str) -> None:
    with pytest.raises(FailedPrecondition, match="too old"):
        check_version(version)
