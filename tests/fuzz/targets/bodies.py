"""Bodies of every operation: InvalidArgument for a request, DataLoss for an answer, and nothing else.

What a request is decoded to, encodes to one that is decoded to the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
from wherry_shared.api import contracts
from wherry_shared.contract import Encoded, pack
from wherry_shared.errors import DataLoss, InvalidArgument

from ..given import Given

ENDPOINTS = [endpoint for contract in contracts() for endpoint in contract.endpoints.values()]
KEYS = sorted({name for endpoint in ENDPOINTS for name in endpoint.parameters})
DIGEST = "sha256:" + "a" * 64
SAMPLES: tuple[Any, ...] = (
    "a", DIGEST, "", 0, 1, -1, 2**63 - 1, 2**64 - 1, True, None, b"\xc0", [], {}, ["a"], {"a": "b"}, 1.5, float("nan"),
    "\U0001f600", {"media_type": "m", "digest": DIGEST, "size": 1}, [{"type": "bind", "source": "/"}], "a/../b", ".",
    [[]], {"a": {}}, "x" * 80, msgpack.Timestamp(1, 2),
)  # fmt: skip
TOKENS = (*(msgpack.packb(key) for key in KEYS), *map(msgpack.packb, SAMPLES), b"\xc7\xff", b"\xdf\xff\xff\xff\xff")
MAX_LEN = 2048


def seeds() -> Iterator[bytes]:
    for number, endpoint in enumerate(ENDPOINTS):
        for turn in range(4):
            body = {name: SAMPLES[(at * 5 + turn) % 10] for at, name in enumerate(endpoint.parameters)}
            yield bytes([0, 0, number]) + pack(body)
        yield bytes([1, 0, number]) + pack({"items": [], "next": ""})
    yield b"\0\0\0" + b"\x91" * 300
    yield b"\1\0\0" + b"\x81\xa1a" * 200


def one(data: bytes) -> None:
    given = Given(data)
    answer, endpoint = given.flag(), ENDPOINTS[given.number(1 << 16) % len(ENDPOINTS)]
    body = given.rest()
    if answer:
        for decode in (endpoint.decode_reply, endpoint.following):
            try:
                decode(body)
            except DataLoss as error:
                str(error).encode()
        return
    try:
        arguments = endpoint.decode_request(body)
    except InvalidArgument as error:
        str(error)
        return
    try:
        again = endpoint.encode_request((), arguments)
    except InvalidArgument:
        return  # a field of any type may hold what only arrives
    assert not isinstance(again, Encoded)
    assert endpoint.decode_request(again) == arguments
