"""The parser of NATS's frames: it says the same however they are cut; what is none of them ends it, without a raise."""

from __future__ import annotations

from collections.abc import Iterator

from wherry_shared.bus.protocol import Message, Receiver

from ..given import Given

LIMIT = 1 << 16
TOKENS = (b"MSG ", b"HMSG ", b"PING\r\n", b"PONG\r\n", b"INFO {}\r\n", b"-ERR ''\r\n", b"+OK\r\n", b"\r\n", b" 1 ",
          b"NATS/1.0", b"NATS/1.0 503\r\n\r\n", b"99999999999999999999", b"-1", b"1_0", b"Status: x\r\n")  # fmt: skip


def seeds() -> Iterator[bytes]:
    yield b"\x09MSG a.b 1 5\r\nhello\r\nMSG a 2 in.box 0\r\n\r\nPING\r\nPONG\r\n+OK\r\n"
    yield b"\x03HMSG a.b 1 r 22 25\r\nNATS/1.0\r\nA: b\r\n\r\nabc\r\nINFO {\"a\":1}\r\n-ERR 'no'\r\n"
    yield b"\x01HMSG a 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\nMSG \xc3\xa9 1 1\r\nx\r\n"
    yield b"\x02MSG a 1 70000\r\n" + b"x" * 100


def one(data: bytes) -> None:
    given = Given(data)
    size = 1 + given.number(256)
    stream = given.rest()
    whole, pieces = Sink(), Sink()
    Receiver(whole, limit=LIMIT).feed(stream)
    receiver = Receiver(pieces, limit=LIMIT)
    for at in range(0, len(stream), size):
        receiver.feed(stream[at : at + size])
    assert whole.heard == pieces.heard
    assert len(receiver._buffer) <= 4 * LIMIT + 2 * len(stream) + (1 << 18)


class Sink:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def on_message(self, sid: str, subject: str, reply: str, block: bytes | None, data: bytes) -> None:
        assert not any(self.heard[-1:]) or self.heard[-1] != "broken"
        message = Message(subject, data, reply, block)
        self.heard.append((sid, subject, reply, block, data, dict(message.headers or {}), message.no_responders))

    def on_ping(self) -> None:
        self.heard.append("ping")

    def on_pong(self) -> None:
        self.heard.append("pong")

    def on_info(self, info: bytes) -> None:
        self.heard.append(info)

    def on_error(self, text: str) -> None:
        self.heard.append(text)

    def on_broken(self, reason: str) -> None:
        self.heard.append("broken")

    def on_lost(self, error: Exception | None) -> None:
        raise AssertionError("nothing was lost")

    def on_pressure(self, paused: bool) -> None:
        raise AssertionError("nothing was written")
