"""Just enough of protobuf's wire format to speak to containerd: messages as dicts of field numbers.

encode({1: "name", 3: {1: "text/plain", 3: 12}})       # nested dict: a message; list: a repeated field
decode(data) -> {1: [b"name"], 3: [b"..."]}             # every field is a list; nested messages stay bytes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Value = int | str | bytes | Mapping[int, Any] | Sequence[Any]
Fields = Mapping[int, Value]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def varint(number: int) -> bytes:
    """Base-128, lowest group first; negative numbers as 64 bits."""
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def encode(fields: Fields) -> bytes:
    """A message. Empty strings and zeros are written too: a reader takes them for what they are."""
    return b"".join(_field(number, value) for number, value in fields.items())


def _field(number: int, value: Value) -> bytes:
    if isinstance(value, int):
        return varint(number << 3 | _VARINT) + varint(value)
    if isinstance(value, str):
        value = value.encode()
    elif isinstance(value, Mapping):
        value = encode(value)
    elif not isinstance(value, bytes):
        return b"".join(_field(number, item) for item in value)
    return varint(number << 3 | _BYTES) + varint(len(value)) + value


def entries(labels: Mapping[str, str]) -> list[Value]:
    """A `map<string, string>` as the repeated entries that it is on the wire."""
    return [{1: key, 2: value} for key, value in labels.items()]


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def scan(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in their order."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            number, at = _read_varint(data, at)
            yield key >> 3, number
            continue
        if kind == _BYTES:
            size, at = _read_varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} is none that containerd sends")
        yield key >> 3, data[at : at + size]
        at += size


def decode(data: bytes) -> dict[int, list[int | bytes]]:
    """A message by field numbers."""
    found: dict[int, list[int | bytes]] = {}
    for number, value in scan(data):
        found.setdefault(number, []).append(value)
    return found


def text(message: Mapping[int, list[int | bytes]], number: int) -> str:
    """A string field; "" where it is missing."""
    value = message.get(number, [b""])[-1]
    return value.decode() if isinstance(value, bytes) else str(value)


def integer(message: Mapping[int, list[int | bytes]], number: int) -> int:
    """A number field; 0 where it is missing."""
    value = message.get(number, [0])[-1]
    return value if isinstance(value, int) else 0


def nested(message: Mapping[int, list[int | bytes]], number: int) -> list[bytes]:
    """The nested messages of a field."""
    return [value for value in message.get(number, []) if isinstance(value, bytes)]
