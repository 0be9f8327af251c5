"""What a Connection does when nats-server dies, freezes or comes back: refuse at once, repair, execute nothing late."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import nats.js.api
import pytest
from housebus import PATIENCE
from natsd import NatsServer, free_port
from wherry_shared.bus.connection import Connection
from wherry_shared.bus.transport import Message as AnyMessage
from wherry_shared.bus.transport import NoResponders
from wherry_shared.errors import DeadlineExceeded, Unavailable

Connect = Callable[..., Awaitable[Connection]]


class Service:
    """Answers `work` and remembers what it was asked."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.executed: list[bytes] = []

    async def start(self) -> Service:
        await self.connection.subscribe("work", self._execute, queue="service")
        return self

    def _execute(self, message: AnyMessage) -> None:
        self.executed.append(message.data)
        if message.reply:
            with contextlib.suppress(Unavailable):
                self.connection.publish(message.reply, b"done " + message.data)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def ask_until_served(client: Connection, data: bytes) -> bytes:
    """As a caller does that waits for its service to come back."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(Unavailable):
                return (await client.request("work", data, timeout=20)).data
            await asyncio.sleep(0.01)


async def test_what_is_asked_during_an_outage_fails_at_once_and_is_never_executed(
    nats_server: NatsServer, connect: Connect
) -> None:
    client, service = await connect(nats_server), await Service(await connect(nats_server)).start()
    assert await ask_until_served(client, b"before") == b"done before"
    nats_server.kill()
    # The first finds a socket that is dead without knowing it, the second one that is known to be.
    for number in range(2):
        with pytest.raises(Unavailable) as caught:
            await client.request("work", b"zombie %d" % number, timeout=3600)
        assert not isinstance(caught.value, NoResponders)
        await until(lambda: not client.connected)
    with pytest.raises(Unavailable):
        client.publish("work", b"zombie publish")
    with pytest.raises(Unavailable):
        await client.subscribe("work", print)
    with pytest.raises(Unavailable):
        await client.flush()
    with pytest.raises(Unavailable):
        await client.writable()
    assert not client._waiting
    nats_server.start()
    assert await ask_until_served(client, b"after") == b"done after"
    await client.flush()
    await service.connection.flush()
    assert service.executed == [b"before", b"after"]


async def test_requests_under_way_fail_when_the_server_dies(nats_server: NatsServer, connect: Connect) -> None:
    client, service = await connect(nats_server), await connect(nats_server)
    asked: list[AnyMessage] = []
    await service.subscribe("silent", asked.append)
    requests = [asyncio.create_task(client.request("silent", b"", timeout=3600)) for _ in range(50)]
    await until(lambda: len(asked) == 50)
    flush = asyncio.create_task(client.flush(3600))
    nats_server.freeze()
    nats_server.kill()
    for result in await asyncio.gather(*requests, return_exceptions=True):
        assert isinstance(result, Unavailable)
    with contextlib.suppress(Unavailable):  # its answer may have been on the way
        await flush
    assert not client._waiting


async def test_bytes_stuck_in_the_write_buffer_are_dropped_with_the_connection(
    nats_server: NatsServer, connect: Connect
) -> None:
    """All buffers are full of work for a frozen server; the connection is given up; the server thaws."""
    client, service = await connect(nats_server), await Service(await connect(nats_server)).start()
    nats_server.freeze()
    filler = bytes(1 << 20)
    while client._link.room.is_set():
        client.publish("filler", filler)
    waiter = asyncio.create_task(client.writable())
    request = asyncio.create_task(client.request("work", b"zombie", timeout=3600))
    await asyncio.sleep(0.05)
    await client._link._process_op_err(ConnectionError("as after two pings without an answer"))
    for task in (waiter, request):
        with pytest.raises(Unavailable):
            await task
    nats_server.thaw()
    assert await ask_until_served(client, b"after") == b"done after"
    await service.connection.flush()
    assert service.executed == [b"after"]


async def test_a_frozen_server_is_noticed_by_its_missing_pongs(
    nats_server: NatsServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wherry_shared.bus.dial.PING_SECONDS", 0.1)
    client = await connect(nats_server)
    await client.subscribe("silent", lambda message: None)
    states: list[bool] = []
    client.on_state.append(states.append)
    async with asyncio.timeout(PATIENCE):  # answered pings are no outage: not in a second in which nothing stalls
        while True:
            states.clear()
            await asyncio.sleep(1)
            if client.connected and not states:
                break
    nats_server.freeze()
    with pytest.raises(Unavailable):
        await client.request("silent", b"", timeout=3600)
    nats_server.thaw()
    await until(lambda: client.connected)
    await client.flush()


async def test_subscriptions_and_state_come_back(nats_server: NatsServer, connect: Connect) -> None:
    client = await connect(nats_server)
    seen: list[bytes] = []
    states: list[bool] = []

    def broken_listener(connected: bool) -> None:
        raise RuntimeError("a bug in a listener")

    client.on_state += [broken_listener, states.append]
    kept = await client.subscribe("news.*", lambda message: seen.append(message.data))
    ended = await client.subscribe("news.*", lambda message: seen.append(b"ended " + message.data))
    for round_ in range(3):
        nats_server.kill()
        await until(lambda: not client.connected)
        if round_ == 0:
            await ended.unsubscribe()
        nats_server.start()
        await until(lambda: states and states[-1])
        client.publish("news.x", b"%d" % round_)
        await client.flush()
    assert seen == [b"0", b"1", b"2"]
    assert states == [False, True] * 3
    nats_server.kill()
    await until(lambda: not client.connected)
    await kept.drain()


async def test_a_graceful_stop_of_the_server_is_an_outage_too(nats_server: NatsServer, connect: Connect) -> None:
    client, service = await connect(nats_server), await Service(await connect(nats_server)).start()
    nats_server.stop()
    await until(lambda: not client.connected)
    nats_server.start()
    assert await ask_until_served(client, b"x") == b"done x"
    assert service.executed == [b"x"]


async def test_another_server_of_the_list_takes_over(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "a") as first, NatsServer(tmp_path / "b") as second:
        client = await Connection.connect([first.url, second.url], name="test", inbox_prefix="_INBOX.test")
        seen: list[bytes] = []
        await client.subscribe("news", lambda message: seen.append(message.data))
        used, other = (first, second) if client.client_url == first.url else (second, first)
        used.kill()
        await until(lambda: client.client_url == other.url)
        client.publish("news", b"x")
        await client.flush()
        assert seen == [b"x"]
        await client.close()


async def test_jetstream_fails_at_once_in_an_outage_and_works_after_it(tmp_path: Path, connect: Connect) -> None:
    with NatsServer(tmp_path, jetstream=True) as server:
        client = await connect(server)
        jetstream = client.jetstream(timeout=3600)
        await jetstream.add_stream(nats.js.api.StreamConfig(name="EV", subjects=["ev.>"]))
        await jetstream.publish("ev.a", b"1")
        server.freeze()
        publish = asyncio.create_task(jetstream.publish("ev.a", b"lost", timeout=3600))
        await asyncio.sleep(0.05)
        server.kill()
        with pytest.raises(nats.errors.Error):
            await publish
        with pytest.raises(nats.errors.Error):
            await jetstream.publish("ev.a", b"lost", timeout=3600)
        server.start()
        await until(lambda: client.connected)
        client._link.abort()
        with pytest.raises(nats.errors.Error):  # although nats-py has not noticed yet
            await jetstream.publish("ev.a", b"lost", timeout=3600)
        await until(lambda: client.connected)
        jetstream = client.jetstream(timeout=10)
        await jetstream.publish("ev.a", b"2")
        pull = await jetstream.pull_subscribe("ev.>", durable="reader")
        assert [message.data for message in await pull.fetch(2, timeout=10)] == [b"1", b"2"]


async def test_closing_during_an_outage(nats_server: NatsServer, connect: Connect) -> None:
    client = await connect(nats_server)
    nats_server.kill()
    await until(lambda: not client.connected)
    await client.close()
    nats_server.start()
    await asyncio.sleep(0.3)
    assert not client.connected


async def test_closing_with_a_frozen_server(nats_server: NatsServer, connect: Connect) -> None:
    client = await connect(nats_server)
    nats_server.freeze()
    while client._link.room.is_set():
        client.publish("filler", bytes(1 << 20))
    await client.close()
    assert not client.connected


async def test_a_peer_that_speaks_nonsense_is_left_and_tried_again(connect: Connect) -> None:
    """Greets as a server twice, then breaks the protocol; the third time it greets with garbage."""
    visits = 0
    info = b'INFO {"version": "2.15.1", "headers": true, "max_payload": 1048576}\r\n'

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal visits
        visits += 1
        if visits == 3:
            writer.write(b"x" * 100_000 + b"\r\n")
        else:
            writer.write(info)
            while not (await reader.readline()).startswith(b"PING"):
                pass
            writer.write(b"PONG\r\n")
            await reader.readline()  # SUB of the inbox
            await reader.readline()  # PING
            writer.write(b"PONG\r\n")
            if visits < 3:
                writer.write(b"220 smtp.example ESMTP\r\n")
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(greet, "127.0.0.1", free_port())
    url = f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    client = await Connection.connect([url], name="test", inbox_prefix="_INBOX.test")
    await until(lambda: visits == 4 and client.connected)
    await client.close()
    listener.close()
    await listener.wait_closed()


async def test_a_server_that_comes_back_too_old_gets_no_credentials_and_is_tried_again() -> None:
    visits, heard = 0, bytearray()
    held: set[asyncio.StreamWriter] = set()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal visits
        visits += 1
        held.add(writer)
        good = visits in (1, 5)
        writer.write(
            b'INFO {"version": "%b", "headers": true, "max_payload": 1024}\r\n' % (b"2.15.1" if good else b"2.9.1")
        )
        if good:
            async for line in reader:
                if line == b"PING\r\n":
                    writer.write(b"PONG\r\n")
                if b"leave" in line:
                    break
        else:
            heard.extend(await reader.read())  # until the client gives it up
        writer.close()
        held.discard(writer)

    listener = await asyncio.start_server(greet, "127.0.0.1", free_port())
    url = f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    client = await Connection.connect([url], name="test", inbox_prefix="_INBOX.test")
    client.publish("leave", b"")
    await until(lambda: visits == 5 and client.connected)
    await until(lambda: len(held) == 1)
    assert bytes(heard) == b""
    await client.close()
    listener.close()
    await listener.wait_closed()


async def test_nobody_answers_within_the_connect_timeout() -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    for patience in (0.3, 3.0, 30.0):  # that it is refused may take its time, too
        with pytest.raises(Unavailable) as caught:
            await Connection.connect([url], name="test", inbox_prefix="_INBOX.test", connect_timeout=patience)
        said = re.escape(f"no NATS server answered at {url} within {patience:g} s")
        if found := re.fullmatch(f"{said}: .*(refused|failed).*", caught.value.message):
            break
    assert found, caught.value


async def test_connecting_waits_for_a_server_that_is_still_starting(tmp_path: Path) -> None:
    server = NatsServer(tmp_path, port=free_port())
    connecting = asyncio.create_task(
        Connection.connect([server.url], name="test", inbox_prefix="_INBOX.test", connect_timeout=30)
    )
    await asyncio.sleep(0.2)
    with server:
        connection = await connecting
        assert connection.connected
        await connection.close()


async def test_a_silent_listener_is_no_server() -> None:
    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(listen, "127.0.0.1", 0)
    url = f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    with pytest.raises(Unavailable):
        await Connection.connect([url], name="test", inbox_prefix="_INBOX.test", connect_timeout=0.3)
    listener.close()


async def test_a_deadline_still_counts_while_the_server_is_frozen(nats_server: NatsServer, connect: Connect) -> None:
    client = await connect(nats_server)
    await client.subscribe("silent", lambda message: None)
    nats_server.freeze()
    with pytest.raises(DeadlineExceeded):
        await client.request("silent", b"", timeout=0.1)
    nats_server.thaw()
