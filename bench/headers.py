"""What a gRPC server says of a failed call: literals of an HPACK block (RFC 7541) without a dynamic table.

Only names and values that are spelled out are read; what stands in the static table (`:status`, `content-type`) is of
no interest. gRPC percent-encodes its messages, so that printable ASCII is all there is.
"""

from __future__ import annotations

import urllib.parse

# RFC 7541, appendix B: the code is canonical, so that the symbols of each length say all of it.
_SYMBOLS = {
    5: "012aceiost", 6: " %-./3456789=A_bdfghlmnpru", 7: ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz", 8: "&*,;XZ",
    10: '!"()?', 11: "'+|", 12: "#>", 13: "\0$@[]~", 14: "^}", 15: "<`{", 19: "\\",
}  # fmt: skip


def _codes() -> dict[tuple[int, int], str]:
    found: dict[tuple[int, int], str] = {}
    code = before = 0
    for length, symbols in _SYMBOLS.items():
        code <<= length - before
        for symbol in symbols:
            found[length, code] = symbol
            code += 1
        before = length
    return found


_CODES = _codes()


def _huffman(data: bytes) -> str:
    out: list[str] = []
    code = length = 0
    for byte in data:
        for shift in range(7, -1, -1):
            code, length = code << 1 | byte >> shift & 1, length + 1
            symbol = _CODES.get((length, code))
            if symbol is not None:
                out.append(symbol)
                code = length = 0
    return "".join(out)


class _Block:
    """A cursor in a header block."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def first(self) -> int:
        return self._data[self._at]

    def integer(self, bits: int) -> int:
        """An integer in the low `bits` of the byte here, and of those behind it."""
        full = (1 << bits) - 1
        value = self._data[self._at] & full
        self._at += 1
        shift = 0
        while value >= full:
            byte = self._data[self._at]
            self._at += 1
            value += (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        return value

    def string(self) -> str:
        coded = self.first() & 0x80
        size = self.integer(7)
        raw = self._data[self._at : self._at + size]
        self._at += size
        return _huffman(raw) if coded else raw.decode(errors="replace")


def spelled_out(block: bytes) -> dict[str, str]:
    """The headers whose names are literals."""
    found: dict[str, str] = {}
    cursor = _Block(block)
    while cursor:
        first = cursor.first()
        if first & 0x80:
            cursor.integer(7)
        elif first & 0xE0 == 0x20:
            cursor.integer(5)
        else:
            name = "" if cursor.integer(6 if first & 0x40 else 4) else cursor.string()
            found[name] = cursor.string()
    return found


def status(blocks: list[bytes]) -> tuple[int, str]:
    """gRPC's status code and message; 2 (Unknown) where it says none."""
    found: dict[str, str] = {}
    for block in blocks:
        found |= spelled_out(block)
    code = found.get("grpc-status", "")
    return int(code) if code.isdigit() else 2, urllib.parse.unquote(found.get("grpc-message", "the call was reset"))
