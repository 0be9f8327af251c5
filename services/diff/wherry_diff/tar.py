"""Reads tar archives: ustar, GNU long names, PAX records, base-256 numbers, sparse files.

The rules of what is accepted are those of containerd's reader (Go's archive/tar): bodies of links, directories and
devices are empty whatever their size says, global PAX headers are read and have no effect, one block of zeros followed
by anything but another is an error. Every value is checked here, so that who extracts need not doubt an `Entry`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from wherry_shared.errors import InvalidArgument, ResourceExhausted

from . import pax, sparse
from .limits import Limits
from .names import clean, show
from .sparse import Segments

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_ID = 2**32 - 2  # 2**32 - 1 is chown(2)'s "leave it as it is"
_MAX_MAJOR = 2**12 - 1
_MAX_MINOR = 2**20 - 1
_MAX_TIME = 2**63 - 1  # nanoseconds; later and earlier times become the epoch, as in containerd
_REMEMBERED = 1 << 14

REGULAR, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_GNU_SPARSE, _GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL = b"S", b"L", b"K", b"x", b"g"
_KINDS = frozenset({REGULAR, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO})
_META = frozenset({_GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL})


class Entry(NamedTuple):
    """One member of the archive. `name` is clean (no leading or trailing slash, no `.`, `..` or empty component) and
    empty for the root; `link` is raw. Times are nanoseconds since the epoch, never negative; `size` is the file's."""

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    atime: int
    mtime: int
    link: bytes
    xattrs: list[tuple[bytes, bytes]] | None
    segments: Segments | None
    device: tuple[int, int] | None


class Stream:
    """The archive's bytes, in the order in which they come and without copying what need not be copied."""

    __slots__ = ("_chunk", "_chunks", "_end", "_pos", "_view")

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = b""
        self._view = memoryview(b"")
        self._pos = 0
        self._end = 0

    def _more(self) -> bool:
        """Go on to the next chunk that is not empty; false at the end of the archive."""
        for chunk in self._chunks:
            if chunk:
                self._chunk, self._view, self._pos, self._end = chunk, memoryview(chunk), 0, len(chunk)
                return True
        return False

    def block(self) -> bytes:
        """The next 512 bytes, or nothing at the end of the archive."""
        pos = self._pos
        if self._end - pos >= BLOCK:
            self._pos = pos + BLOCK
            return self._chunk[pos : pos + BLOCK]
        if pos == self._end and not self._more():
            return b""
        return self.read(BLOCK)

    def take(self, limit: int) -> memoryview:
        """Between one and `limit` bytes: as many as lie ready."""
        pos = self._pos
        if pos == self._end:
            if not self._more():
                raise InvalidArgument("the archive ends in the middle of an entry")
            pos = 0
        self._pos = stop = min(pos + limit, self._end)
        return self._view[pos:stop]

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        parts = []
        while size:
            parts.append(self.take(size))
            size -= len(parts[-1])
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """Go past `size` bytes."""
        if size <= self._end - self._pos:
            self._pos += size
            return
        while size:
            size -= len(self.take(size))

    def drain(self) -> None:
        """Read to the end: the digest covers what follows the archive too."""
        while self._more():
            pass
        self._pos = self._end


class Reader:
    """The entries of an archive, one after another; the body of the newest is read with `take`."""

    __slots__ = (
        "_apparent", "_headers", "_limits", "_names", "_owners", "_padding", "_stream", "_sums", "_times",
        "count", "left",
    )  # fmt: skip

    def __init__(self, stream: Stream, limits: Limits) -> None:
        self._stream = stream
        self._limits = limits
        self._owners: dict[bytes, tuple[int, int, int]] = {}
        self._times: dict[bytes, int] = {}
        self._sums: dict[bytes, int] = {}
        self._padding = 0
        self._headers = 0
        self._names = 0
        self._apparent = 0
        self.count = 0
        self.left = 0

    def take(self, limit: int) -> memoryview:
        """The next piece of the body: between one and `limit` bytes, which is at most `left`."""
        piece = self._stream.take(limit)
        self.left -= len(piece)
        return piece

    def next(self) -> Entry | None:
        """Go past the body of the last entry and read the next header; `None` when the archive is at its end.

        Raises `InvalidArgument` (malformed) and `ResourceExhausted` (a bound of `Limits`).
        """
        stream = self._stream
        name = link = b""
        records: pax.Records | None = None
        while True:
            if rest := self.left + self._padding:
                stream.skip(rest)
                self.left = self._padding = 0
            block = stream.block()
            if not block or block == _ZEROS:
                if name or link or records:
                    raise InvalidArgument("the archive ends after an extended header that belongs to no entry")
                self._finish(block)
                return None
            self._headers += 1
            self._verify(block)
            kind = block[156:157]
            if kind not in _META:
                return self._entry(block, name, link, records)
            payload = self._payload(block)
            if kind == _GNU_NAME:
                name = payload.rstrip(b"\0")
            elif kind == _GNU_LINK:
                link = payload.rstrip(b"\0")
            else:
                parsed = pax.parse(payload)
                records = parsed if kind == _PAX else records

    def _verify(self, block: bytes) -> None:
        """Compare the checksum: the sum of all bytes, its own field read as blanks.

        Adler-32's low half is one plus the sum of the bytes modulo 65521: some ten times faster than `sum`, and one
        wrong value in 65521 passes. A mismatch is looked at again with signed bytes, as very old writers summed them.
        """
        field = block[148:156]
        expected = self._sums.get(field)
        if expected is None:
            _make_room(self._sums)
            expected = self._sums[field] = (_number(field, "checksum") + sum(field) - 255) % 65521
        if expected != zlib.adler32(block) & 0xFFFF:
            signed = sum(struct.unpack("512b", block)) - sum(struct.unpack("8b", field)) + 256
            if _number(field, "checksum") != signed:
                raise InvalidArgument(f"header {self._headers} of the archive has a wrong checksum")

    def _finish(self, block: bytes) -> None:
        if block:
            second = self._stream.block()
            if second and second != _ZEROS:
                raise InvalidArgument("a lone block of zeros in the middle of the archive")
        self._stream.drain()

    def _payload(self, block: bytes) -> bytes:
        """The contents of an extended header."""
        if self._headers > 4 * self._limits.max_entries:
            raise ResourceExhausted(f"more than {4 * self._limits.max_entries} headers in the layer")
        size = _number(block[124:136], "size of an extended header")
        if size > self._limits.max_header:
            raise ResourceExhausted(f"an extended header of {size} bytes: the bound is {self._limits.max_header}")
        payload = self._stream.read(size)
        self._padding = -size % BLOCK
        return payload

    def _entry(self, block: bytes, name: bytes, link: bytes, records: pax.Records | None) -> Entry:
        """Put an entry together from its header and from what extended headers said before it."""
        kind = block[156:157]
        mode, uid, gid = self._owners.get(block[100:124]) or self._owner(block)
        size = _number(block[124:136], "size")
        mtime = atime = self._times.get(block[136:148]) or self._time(block)
        xattrs = segments = None
        if records:
            uid, gid = _id(pax.number(records, b"uid", uid)), _id(pax.number(records, b"gid", gid))
            size = pax.number(records, b"size", size)
            mtime = pax.time(records, b"mtime", mtime)
            atime = _bounded(max(pax.time(records, b"atime", mtime), mtime))
            mtime = _bounded(mtime)
            xattrs = self._xattrs(records)
            name = name or pax.text(records, b"path", b"")
            link = link or pax.text(records, b"linkpath", b"")
        raw = name or _header_name(block)
        if kind == b"\0":  # a regular file, or, in the oldest archives, a directory
            kind = DIRECTORY if raw.endswith(b"/") else REGULAR
        if kind == REGULAR or kind == _GNU_SPARSE:  # noqa: SIM109 - the hot path
            self.left, self._padding = size, -size % BLOCK
            if kind == _GNU_SPARSE or (records and sparse.version(records)):
                size, segments, raw = self._sparse(block, kind, raw, size, records or {})
                kind = REGULAR
        elif kind not in _KINDS:
            raise InvalidArgument(f"{show(raw)} is of the unknown type {show(kind)}")
        elif not link:
            link = block[157:257].partition(b"\0")[0]
        device = _device(block) if kind == CHAR or kind == BLOCK_DEVICE else None  # noqa: SIM109
        return Entry(self._checked(raw), kind, mode, uid, gid, size, atime, mtime, link, xattrs, segments, device)

    def _owner(self, block: bytes) -> tuple[int, int, int]:
        """Mode, uid and gid, remembered by their bytes: they repeat from entry to entry."""
        _make_room(self._owners)
        owner = self._owners[block[100:124]] = (
            _number(block[100:108], "mode") & 0o7777,
            _id(_number(block[108:116], "uid")),
            _id(_number(block[116:124], "gid")),
        )
        return owner

    def _time(self, block: bytes) -> int:
        """The time in nanoseconds, remembered by its bytes."""
        _make_room(self._times)
        time = self._times[block[136:148]] = _bounded(_number(block[136:148], "mtime") * 1_000_000_000)
        return time

    def _checked(self, raw: bytes) -> bytes:
        """The clean name, counted and within the bounds."""
        limits = self._limits
        self.count += 1
        self._names += len(raw)
        if self.count > limits.max_entries:
            raise ResourceExhausted(f"more than {limits.max_entries} entries in the layer")
        if self._names > limits.max_name_bytes:
            raise ResourceExhausted(f"more than {limits.max_name_bytes} bytes of names in the layer")
        if b"\0" in raw:
            raise InvalidArgument(f"NUL in the name {show(raw)}")
        name = clean(raw)
        if len(name) > limits.max_component:
            longest = max(map(len, name.split(b"/")))
            if len(name) > limits.max_path or longest > limits.max_component:
                raise ResourceExhausted(f"the name {show(raw)} is too long: {len(name)} bytes, longest part {longest}")
        return name

    def _xattrs(self, records: pax.Records) -> list[tuple[bytes, bytes]] | None:
        found = pax.xattrs(records)
        if len(found) > self._limits.max_xattrs:
            raise ResourceExhausted(f"an entry with {len(found)} xattrs: the bound is {self._limits.max_xattrs}")
        for name, value in found:
            if len(value) > self._limits.max_xattr_value:
                raise ResourceExhausted(f"the xattr {show(name)} has {len(value)} bytes")
        return found or None

    def _sparse(
        self, block: bytes, kind: bytes, raw: bytes, stored: int, records: pax.Records
    ) -> tuple[int, Segments, bytes]:
        """Apparent size, map and real name of a sparse file; its body begins behind the map afterwards."""
        if kind == _GNU_SPARSE:
            size, segments = sparse.old_gnu(block, self._stream.block, _number)
        else:
            size = pax.number(records, b"GNU.sparse.size", stored)
            size = pax.number(records, b"GNU.sparse.realsize", size)
            raw = pax.text(records, b"GNU.sparse.name", raw)
            if sparse.version(records) == b"1":
                used, segments = sparse.from_body(self._stream.read, stored)
                self.left = stored = stored - used
            else:
                segments = sparse.from_records(records)
        self._apparent += size
        if self._apparent > self._limits.max_bytes:
            raise ResourceExhausted(f"sparse files of more than {self._limits.max_bytes} bytes in the layer")
        return size, sparse.checked(raw, segments, stored, size), raw


def _header_name(block: bytes) -> bytes:
    """The name out of the header itself: 100 bytes, before which ustar and star may put a prefix."""
    name = block[: block.find(0, 0, 100)] if not block[99] else block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":
        # star keeps times in the last 24 bytes of the prefix
        prefix = block[345:476] if block[508:512] == b"tar\0" else block[345:500]
        return prefix.partition(b"\0")[0] + b"/" + name
    return name


def _device(block: bytes) -> tuple[int, int]:
    major, minor = _number(block[329:337], "device number"), _number(block[337:345], "device number")
    if major > _MAX_MAJOR or minor > _MAX_MINOR:
        raise InvalidArgument(f"the device {major}:{minor} of {show(_header_name(block))} is out of range")
    return major, minor


def _id(number: int) -> int:
    if number > _MAX_ID:
        raise InvalidArgument(f"the owner {number} is out of range")
    return number


def _make_room(cache: dict[bytes, Any]) -> None:
    """Keep a hostile archive from growing what is remembered."""
    if len(cache) >= _REMEMBERED:
        cache.clear()


def _bounded(time: int) -> int:
    return time if 0 <= time <= _MAX_TIME else 0


def _number(field: bytes, what: str) -> int:
    """Octal digits between blanks and NULs, or, as GNU has it, a big-endian number behind a byte with the high bit.

    Raises `InvalidArgument` for anything else: signs, numbers below 0 (a time may be) and beyond 63 bits.
    """
    if field[0] & 0x80:
        number = int.from_bytes(field, "big") & ~(0x80 << (len(field) - 1) * 8)
        if field[0] & 0x40:
            number -= 1 << (len(field) * 8 - 1)
        if number >= 2**63 or (number < 0 and what != "mtime"):
            raise InvalidArgument(f"the {what} {number} is out of range")
        return number
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if not digits.isdigit():
        digits = digits.partition(b"\0")[0]  # as a C string ends
    try:
        if digits.isdigit():
            return int(digits, 8)
    except ValueError:
        pass
    raise InvalidArgument(f"{show(field)} is no {what}")
