"""protobuf and ttrpc as shims speak them: what is sent comes back, and what is neither is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from housebus import PATIENCE
from wherry_shared.errors import DataLoss, FailedPrecondition, Unavailable, Unknown
from wherry_task.backends import shim, ttrpc
from wherry_task.backends.protobuf import decode, encode, integer, nanoseconds, nested, octets, text


def test_a_message_and_back() -> None:
    data = encode({1: "näme", 2: 300, 3: {1: b"\x00\xff"}, 4: ["a", "b"], 5: "", 6: 0, 7: True, 8: {}})
    message = decode(data)
    assert (text(message, 1), integer(message, 2), integer(message, 7)) == ("näme", 300, 1)
    assert octets(decode(octets(message, 3)), 1) == b"\x00\xff"
    assert nested(message, 4) == [b"a", b"b"]
    assert 5 not in message and 6 not in message and message[8] == [b""]
    assert (text(message, 9), integer(message, 9), octets(message, 9)) == ("", 0, b"")


def test_negative_numbers_and_times() -> None:
    assert integer(decode(encode({1: -5})), 1) == (1 << 64) - 5
    assert nanoseconds(encode({1: 12, 2: 34})) == 12_000_000_034
    assert nanoseconds(encode({1: -62135596800})) == 0  # Go's zero time
    assert nanoseconds(b"") == 0


@pytest.mark.parametrize("data", [b"\x0a\x05ab", b"\x08", b"\x08" + b"\xff" * 12, b"\x0b", b"\x09abc"])
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(DataLoss):
        decode(data)


async def test_calls_at_once_errors_and_the_end(tmp_path: Path) -> None:
    async def handle(service: str, method: str, payload: bytes) -> bytes:
        if method == "Fail":
            raise FailedPrecondition("not now")
        return encode({1: f"{service}.{method}", 2: payload})

    server = ttrpc.Server(handle)
    path = str(tmp_path / "s")
    await server.start(path)
    client = await ttrpc.Client.connect(path, "ns")
    answers = await asyncio.gather(*(client.call("S", f"M{n}", {1: n}, patience=PATIENCE) for n in range(1, 50)))
    assert [text(decode(a), 1) for a in answers] == [f"S.M{n}" for n in range(1, 50)]
    assert [integer(decode(octets(decode(a), 2)), 1) for a in answers] == list(range(1, 50))
    with pytest.raises(FailedPrecondition, match="not now"):
        await client.call("S", "Fail", {}, patience=PATIENCE)
    gone = asyncio.Event()
    client.on_end = gone.set
    await server.close()
    async with asyncio.timeout(PATIENCE):
        await gone.wait()
    with pytest.raises(Unavailable):
        await client.call("S", "M", {}, patience=5)
    await client.close()


async def test_a_silent_or_talkative_server(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        if talkative:
            writer.write(b"\xff" * 64)

    talkative = False
    server = await asyncio.start_unix_server(serve, str(tmp_path / "s"))
    client = await ttrpc.Client.connect(str(tmp_path / "s"), "ns")
    with pytest.raises(Unavailable, match="has not answered"):
        await client.call("S", "M", {}, patience=0.1)
    assert client.alive
    await client.close()
    talkative = True
    client = await ttrpc.Client.connect(str(tmp_path / "s"), "ns")
    with pytest.raises(Unavailable, match="gone"):
        await client.call("S", "M", {}, patience=PATIENCE)
    await client.close()
    server.close()


def test_every_way_in_which_a_shim_says_where_it_listens() -> None:
    wanted = {"version": 3, "address": "/run/s/x", "protocol": "ttrpc"}
    assert shim._bootstrap(b'{"version": 3, "address": "unix:///run/s/x", "protocol": "ttrpc"}\n') == wanted
    assert shim._bootstrap(b"unix:///run/s/x\n") == {**wanted, "version": 2}
    assert shim._bootstrap(encode({1: 3, 2: "unix:///run/s/x", 3: "ttrpc"})) == wanted
    for words in (b'{"version": 3, "address": "unix:///x", "protocol": "grpc"}', b"{}", b"", b"{not json", b"\xff\xff"):
        with pytest.raises((Unknown, DataLoss)):
            shim._bootstrap(words)
