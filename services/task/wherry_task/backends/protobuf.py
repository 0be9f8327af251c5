"""Just enough of protobuf's wire format for shim v2: messages as dicts of field numbers.

encode({1: "name", 3: {1: "text/plain", 3: 12}})       # nested dict: a message; list: a repeated field
decode(data) -> {1: [b"name"], 3: [b"..."]}             # every field is a list; nested messages stay bytes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wherry_shared.errors import DataLoss

Message = Mapping[int, list[int | bytes]]
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MASK = (1 << 64) - 1


def encode(fields: Mapping[int, Any]) -> bytes:
    """A message of numbers, texts, bytes, mappings (messages) and sequences of them. What is empty is left out."""
    return b"".join(_field(number, value) for number, value in fields.items() if value or isinstance(value, Mapping))


def _field(number: int, value: Any) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(int(value))
    if isinstance(value, str):
        value = value.encode()
    elif isinstance(value, Mapping):
        value = encode(value)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        return b"".join(_field(number, item) for item in value)
    body = bytes(value)
    return _varint(number << 3 | _BYTES) + _varint(len(body)) + body


def _varint(number: int) -> bytes:
    number &= _MASK
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def decode(data: bytes) -> dict[int, list[int | bytes]]:
    """A message by field numbers. DataLoss when it is none."""
    found: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(data):
        key, at = _read(data, at)
        kind = key & 7
        value: int | bytes
        if kind == _VARINT:
            value, at = _read(data, at)
        elif kind in (_BYTES, _FIXED32, _FIXED64):
            size, at = _read(data, at) if kind == _BYTES else (4 if kind == _FIXED32 else 8, at)
            value, at = data[at : at + size], at + size
        else:
            raise DataLoss(f"a protobuf message with wire type {kind}")
        if at > len(data):
            raise DataLoss("a protobuf message that ends too early")
        found.setdefault(key >> 3, []).append(value)
    return found


def _read(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & _MASK, at
        shift += 7
    raise DataLoss("a protobuf number that does not end")


def numbers(packed: bytes) -> list[int]:
    """The numbers of a packed repeated field."""
    found, at = [], 0
    while at < len(packed):
        number, at = _read(packed, at)
        found.append(number)
    return found


def text(message: Message, number: int) -> str:
    """A string field; "" where it is missing."""
    return octets(message, number).decode(errors="replace")


def octets(message: Message, number: int) -> bytes:
    """A bytes field or a nested message; b"" where it is missing."""
    value = message.get(number, [b""])[-1]
    return value if isinstance(value, bytes) else b""


def integer(message: Message, number: int) -> int:
    """A number field; 0 where it is missing."""
    value = message.get(number, [0])[-1]
    return value if isinstance(value, int) else 0


def nested(message: Message, number: int) -> list[bytes]:
    """The nested messages of a repeated field."""
    return [value for value in message.get(number, []) if isinstance(value, bytes)]


def any_of(kind: str, value: bytes) -> dict[int, Any]:
    """A google.protobuf.Any."""
    return {1: kind, 2: value}


def nanoseconds(timestamp: bytes) -> int:
    """A google.protobuf.Timestamp as unix time in nanoseconds; 0 for none and for Go's zero time."""
    message = decode(timestamp)
    seconds = integer(message, 1)
    seconds = seconds - (1 << 64) if seconds >> 63 else seconds
    return max(0, seconds * 10**9 + integer(message, 2))
