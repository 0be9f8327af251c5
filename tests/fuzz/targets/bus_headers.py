"""Header blocks: no block raises, and what is written is read as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from wherry_shared.bus.protocol import HEADERS_MAX, encode_headers, parse_headers
from wherry_shared.bus.serve import _deadline, error_answer
from wherry_shared.errors import InvalidArgument, from_code

from ..given import Given

TOKENS = (b"NATS/1.0", b"\r\n", b": ", b"Status", b"Nats-Service-Error", b"Nats-Service-Error-Code: 5", b"inf", b"nan")


def seeds() -> Iterator[bytes]:
    yield b"\0NATS/1.0 503 No Responders\r\nA: b\r\na: c\r\nA: d\r\n\r\n"
    yield b"\0NATS/1.0\r\nNats-Service-Error: no\r\nNats-Service-Error-Code: 5\r\nDeadline: 1e999\r\n\r\n"
    yield b"\1\x05Trace\x05value\x03Key\x02ok"


def one(data: bytes) -> None:
    given = Given(data)
    if not given.number(2):
        block = given.rest()
        found = parse_headers(block)
        assert len(found) <= HEADERS_MAX + 2
        for name, value in found.items():
            assert name and ":" not in name
            with suppress(InvalidArgument):
                assert _deadline(value) >= 0
        error_travels(block)
        return
    headers = dict(given.some(4, lambda: (given.text(), given.text())))
    try:
        block = encode_headers(headers)
    except InvalidArgument:
        return
    assert parse_headers(block) == {name: value.strip(" \t") for name, value in headers.items()}


def error_travels(block: bytes) -> None:
    """Any text of an error can be sent."""
    text = block.decode("utf-8", "surrogateescape")
    body, headers = error_answer(from_code(block[0] if block else 0, text))
    assert headers is not None and isinstance(body, bytes)
    assert set(parse_headers(encode_headers(headers))) <= set(headers)
