"""The HTTP client below the registry's: kept connections, heads and bodies of strangers, uploads that are cut short."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop
from wherry.registry import http

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
TIMES = http.Timeouts(connect=60, head=60, idle=60)
SHORT = http.Timeouts(connect=60, head=1, idle=0.5)  # where one of them is to pass
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Line:
    """A server that speaks bytes, and how many connections it had."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.target = http.Target("127.0.0.1", port, tls)
        self.connections = 0

    async def ask(self, pool: http.Pool, method: str = "GET", body: bytes | http.Body | None = None) -> http.Response:
        return await pool.request(method, self.target, "http://127.0.0.1/", "/", {"Host": "127.0.0.1"}, body)

    async def whole(self, pool: http.Pool, method: str = "GET", body: bytes | http.Body | None = None) -> bytes:
        parts = []
        async with await self.ask(pool, method, body) as response:
            while chunk := await response.readany():
                parts.append(chunk)
        return b"".join(parts)


@asynccontextmanager
async def speaking(
    talk: Talk,
    server_tls: ssl.SSLContext | None = None,
    client_tls: ssl.SSLContext | None = None,
    times: http.Timeouts = TIMES,
) -> AsyncIterator[tuple[Line, http.Pool]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line.connections += 1
        try:
            await talk(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_tls)
    line = Line(server.sockets[0].getsockname()[1], client_tls)
    pool = http.Pool(lambda host: [host], times)
    async with server:
        yield line, pool
        pool.close()


def answering(*answers: bytes, then: Talk | None = None) -> Talk:
    """One answer for each request of a connection."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        if then is not None:
            await then(reader, writer)
        else:
            await reader.read()

    return talk


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def test_a_connection_is_kept_for_the_next_request() -> None:
    async with speaking(answering(OK, OK, OK)) as (line, pool):
        assert [await line.whole(pool) for _ in range(3)] == [b"ok"] * 3
        assert line.connections == 1


async def test_an_answer_that_was_not_read_costs_its_connection() -> None:
    async with speaking(answering(OK, OK)) as (line, pool):
        (await line.ask(pool)).close()
        await (await line.ask(pool)).release()
        assert await line.whole(pool) == b"ok"
        assert line.connections == 2


async def test_a_kept_connection_that_ended_is_replaced() -> None:
    async with speaking(answering(OK, then=hang_up)) as (line, pool):
        for _ in range(3):
            assert await line.whole(pool) == b"ok"
        assert line.connections == 3

    async def silently(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")  # the second request, and then nothing

    async with speaking(answering(OK, then=silently)) as (line, pool):
        assert await line.whole(pool) == b"ok"
        assert await line.whole(pool) == b"ok"
        with pytest.raises(http.Dropped):  # bytes that may have been taken are not sent twice unasked
            await line.whole(pool, "PATCH", b"x")


async def test_bytes_that_came_unasked_are_no_answer() -> None:
    wanted, sent = asyncio.Event(), asyncio.Event()

    async def more(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await wanted.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        sent.set()
        await reader.read()

    evil = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    for first, later in ((answering(OK, then=more), True), (answering(OK + evil), False)):
        async with speaking(first) as (line, pool):
            assert await line.whole(pool) == b"ok"
            wanted.set()
            if later:
                await sent.wait()
            await asyncio.sleep(0.1)
            assert await line.whole(pool) == b"ok"
            assert line.connections == 2


@pytest.mark.parametrize(
    "head",
    [
        b"\x00\x01\x02\r\n\r\n", b"HTTP/2 200 OK\r\n\r\n", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX Y: 1\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20),
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200_000,
    ],
)  # fmt: skip
async def test_what_is_not_http_is_an_error(head: bytes) -> None:
    async with speaking(answering(head)) as (line, pool):
        with pytest.raises((http.ProtocolError, http.Dropped)):
            await line.whole(pool)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nok",
        b"HTTP/1.1 200 O", b"",
    ],
)  # fmt: skip
async def test_an_answer_that_ends_early_is_dropped(answer: bytes) -> None:
    async with speaking(answering(answer, then=hang_up)) as (line, pool):
        with pytest.raises(http.Dropped):
            await line.whole(pool)


async def test_interim_answers_are_passed_over_for_so_long() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    async with speaking(answering(interim * 3 + OK)) as (line, pool):
        assert await line.whole(pool) == b"ok"

    async def for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(interim)
            await writer.drain()
            await asyncio.sleep(0.01)

    async with speaking(for_ever, times=SHORT) as (line, pool):
        with pytest.raises(TimeoutError):
            await line.whole(pool)


async def test_a_body_of_one_piece_or_of_many() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n3\r\nend\r\n0\r\n\r\n"
    closing = b"HTTP/1.0 200 OK\r\n\r\nto the end"
    async with speaking(answering(chunked, OK)) as (line, pool):
        assert await line.whole(pool) == b"okend"
        assert await line.whole(pool) == b"ok"
        assert line.connections == 1
    async with speaking(answering(closing, then=hang_up)) as (line, pool):
        assert await line.whole(pool) == b"to the end"


async def test_a_reader_that_waits_stops_the_sender() -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    async with speaking(flood) as (line, pool), await line.ask(pool) as response:
        await response.readany()
        settled = -1
        while sent != settled:  # all that the sockets hold on the way
            settled = sent
            await asyncio.sleep(0.2)
            assert sent < 64 << 20
        got = 0
        while got < settled + (1 << 20):
            got += len(await response.readany())


@pytest.fixture(scope="module")
def tls_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context and one that trusts it, as 127.0.0.1."""
    where = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(where / "key.pem"),
         "-out", str(where / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(where / "cert.pem", where / "key.pem")
    return server, ssl.create_default_context(cafile=str(where / "cert.pem"))


LONG = os.urandom(3 << 20)


def long_answer(data: bytes = LONG, extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data + extra


async def received(response: http.Response, room: int = 1 << 20) -> list[bytes]:
    """All of a body, piece by piece."""
    view, pieces = memoryview(bytearray(room)), []
    while count := await response.readinto(view):
        pieces.append(bytes(view[:count]))
    return pieces


@pytest.mark.parametrize("room", [1 << 20, len(LONG), len(LONG) + 1, 100_000, len(LONG) - 1])
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("tls", [False, True])
def test_a_long_body_comes_where_it_is_wanted(
    room: int, loop: Callable[[], asyncio.AbstractEventLoop], tls: bool, tls_pair: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    async def scenario() -> None:
        server, client = tls_pair if tls else (None, None)
        async with speaking(answering(long_answer(), OK, long_answer(), OK), server, client) as (line, pool):
            for _ in range(2):
                async with await line.ask(pool) as response:
                    pieces = await received(response, room)
                assert b"".join(pieces) == LONG
                assert len(pieces) < 64  # many at a time, not what each packet brought
                assert await line.whole(pool) == b"ok"
            assert line.connections == 1

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scenario())


@pytest.mark.parametrize("room", [1 << 20, len(LONG)])
async def test_bytes_behind_a_long_body_are_no_answer(room: int) -> None:
    evil = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    async with speaking(answering(long_answer(extra=evil))) as (line, pool):
        for _ in range(2):
            async with await line.ask(pool) as response:
                assert b"".join(await received(response, room)) == LONG
        assert line.connections == 2


async def test_a_long_body_that_ends_early_or_stops_is_an_error() -> None:
    async def stop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    for then, error in ((hang_up, http.Dropped), (stop, TimeoutError)):
        cut = speaking(answering(long_answer()[:-1], then=then), times=TIMES if then is hang_up else SHORT)
        async with cut as (line, pool), await line.ask(pool) as response:
            got, view = 0, memoryview(bytearray(1 << 20))
            with pytest.raises(error):
                while count := await response.readinto(view):
                    got += count
            assert got == len(LONG) - 1 or error is TimeoutError
            assert await response.readinto(view) == 0


async def test_a_slow_body_comes_as_it_comes() -> None:
    pieces: list[bytes] = []

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(LONG), 1 << 20):
            while sum(map(len, pieces)) < at:
                await asyncio.sleep(0.01)
            writer.write(LONG[at : at + (1 << 20)])

    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(LONG)
    async with speaking(answering(head, then=drip)) as (line, pool), await line.ask(pool) as response:
        view = memoryview(bytearray(2 << 20))
        while count := await response.readinto(view):  # none waits until there is no room left
            pieces.append(bytes(view[:count]))
        assert b"".join(pieces) == LONG
        assert len(pieces) >= 3


async def test_a_body_of_unknown_length_comes_there_too() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n300000\r\n" + LONG + b"\r\n0\r\n\r\n"
    closing = b"HTTP/1.0 200 OK\r\n\r\n" + LONG
    async with speaking(answering(chunked, OK)) as (line, pool):
        async with await line.ask(pool) as response:
            assert b"".join(await received(response, 100_000)) == LONG
        assert await line.whole(pool) == b"ok"
        assert line.connections == 1
    async with speaking(answering(closing, then=hang_up)) as (line, pool), await line.ask(pool) as response:
        assert b"".join(await received(response)) == LONG


async def test_a_server_that_wants_to_close_is_not_asked_again() -> None:
    last = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(LONG) + LONG
    async with speaking(answering(last, OK)) as (line, pool):
        async with await line.ask(pool) as response:
            assert b"".join(await received(response)) == LONG
        assert b"".join([await line.whole(pool)]) == LONG
        assert line.connections == 2


def endless(size: int, sent: list[int]) -> http.Body:
    async def chunks() -> AsyncGenerator[bytes, None]:
        for _ in range(size // 65536):
            sent.append(65536)
            yield b"x" * 65536

    return http.Body(size, chunks)


async def test_an_answer_before_the_end_of_an_upload_ends_it() -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        while await reader.read(65536):
            await asyncio.sleep(0.001)

    sent: list[int] = []
    async with speaking(early) as (line, pool):
        async with await line.ask(pool, "PATCH", endless(1 << 30, sent)) as response:
            assert response.status == 401
        assert sum(sent) < 64 << 20
        (await line.ask(pool)).close()
        assert line.connections == 2  # a request that was cut short leaves nothing to go on with


async def test_an_upload_that_nobody_takes_is_given_up() -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(3600)

    async with speaking(deaf, times=SHORT) as (line, pool):
        with pytest.raises(TimeoutError):
            await line.ask(pool, "PATCH", endless(1 << 30, []))


async def test_the_first_address_that_answers_serves() -> None:
    async with speaking(answering(OK)) as (line, _):
        pool = http.Pool(lambda host: ["127.0.0.2", "127.0.0.1"], TIMES)
        target = http.Target("name.example", line.target.port)
        async with await pool.request("GET", target, "http://name.example/", "/", {"Host": "x"}) as response:
            assert response.status == 200
        pool.close()
        nobody = http.Pool(lambda host: ["127.0.0.2", "127.0.0.3"], TIMES)
        with pytest.raises(http.ConnectError):
            await nobody.request("GET", target, "http://name.example/", "/", {"Host": "x"})
        nowhere = http.Pool(lambda host: [], TIMES)
        with pytest.raises(http.ConnectError):
            await nowhere.request("GET", target, "http://name.example/", "/", {"Host": "x"})
