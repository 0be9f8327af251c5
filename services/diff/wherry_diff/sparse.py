"""Sparse files in tar: GNU's own type `S`, and its PAX formats 0.0, 0.1 and 1.0 (GNU tar manual, "Sparse Formats").

A map is a list of (offset, length) in bytes: where in the file the pieces of the body go. All between is a hole.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise

from wherry_shared.errors import InvalidArgument

from . import pax
from .names import show

Segments = list[tuple[int, int]]
Number = Callable[[bytes, str], int]

_BLOCK = 512
_OLD_FIELDS = struct.Struct("12s12s")
_OLD_IN_HEADER = slice(386, 482)
_OLD_EXTENDED_AT = 482
_OLD_SIZE = slice(483, 495)
_OLD_IN_BLOCK = slice(0, 504)
_OLD_MORE_AT = 504
_MAX_SEGMENTS = 1 << 16


def checked(name: bytes, segments: Segments, stored: int, size: int) -> Segments:
    """The map, if its pieces ascend, do not overlap, make up the body's `stored` bytes and end within `size`."""
    ends = [(offset, offset + length) for offset, length in segments]
    orderly = all(before[1] <= after[0] for before, after in pairwise(ends))
    if not orderly or sum(length for _, length in segments) != stored or (ends and ends[-1][1] > size):
        raise InvalidArgument(f"the map of the sparse file {show(name)} contradicts its size")
    return [segment for segment in segments if segment[1]]


def old_gnu(header: bytes, next_block: Callable[[], bytes], number: Number) -> tuple[int, Segments]:
    """Real size and map of type `S`: four pieces in the header, more in blocks that follow it."""
    segments: Segments = []
    structs, more = header[_OLD_IN_HEADER], header[_OLD_EXTENDED_AT]
    while True:
        for offset, length in _OLD_FIELDS.iter_unpack(structs):
            if not length[0]:
                break
            segments.append((number(offset, "sparse offset"), number(length, "sparse length")))
        if not more:
            return number(header[_OLD_SIZE], "real size"), segments
        if len(segments) > _MAX_SEGMENTS:
            raise InvalidArgument(f"a sparse file of more than {_MAX_SEGMENTS} pieces")
        block = next_block()
        if not block:
            raise InvalidArgument("the archive ends in the map of a sparse file")
        structs, more = block[_OLD_IN_BLOCK], block[_OLD_MORE_AT]


def version(records: pax.Records) -> bytes | None:
    """`0` or `1`, the major version of the sparse format that the records speak of; none if they speak of none."""
    stated = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
    if stated == (b"1", b"0"):
        return b"1"
    if stated in ((b"0", b"0"), (b"0", b"1")) or (stated == (b"", b"") and b"GNU.sparse.map" in records):
        return b"0"
    if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
        raise InvalidArgument("a sparse file in an unknown format")
    return None


def from_records(records: pax.Records) -> Segments:
    """The map of the formats 0.0 and 0.1, which stands in the extended header."""
    if b"GNU.sparse.map" not in records:
        raise InvalidArgument("a sparse file without a map")
    numbers = [pax.decimal(field, "sparse map") for field in records[b"GNU.sparse.map"].split(b",") if field]
    return _paired(numbers)


def from_body(read: Callable[[int], bytes], left: int) -> tuple[int, Segments]:
    """Bytes used and map of the format 1.0, where decimal lines at the start of the body hold it, padded to blocks."""
    text, lines, wanted = b"", [b""], 1
    used = 0
    while len(lines) <= wanted:  # the last element of `lines` is not yet whole
        if used + _BLOCK > left or len(lines) > 2 * _MAX_SEGMENTS:
            raise InvalidArgument("the map of a sparse file does not end")
        text += read(_BLOCK)
        used += _BLOCK
        *whole, text = text.split(b"\n")
        lines[-1:] = [*whole, text]
        if len(lines) > 1 and wanted == 1:
            wanted = 1 + 2 * pax.decimal(lines[0], "count of sparse pieces")
        if len(text) > _BLOCK:
            raise InvalidArgument("the map of a sparse file has an endless line")
    return used, _paired([pax.decimal(line, "sparse map") for line in lines[1:wanted]])


def _paired(numbers: list[int]) -> Segments:
    if len(numbers) % 2:
        raise InvalidArgument("the map of a sparse file has an offset without a length")
    return list(zip(numbers[::2], numbers[1::2], strict=True))
