"""Writes the headers of a tar archive: ustar, and a PAX header before it where ustar has no room (POSIX.1-2017, pax).

The same entry gives the same bytes, always. Names stand as raw bytes, as the kernel has them. A PAX record's keyword
ends at the first `=`, so an extended attribute with one in its name cannot be written.
"""

from __future__ import annotations

import os
import zlib
from typing import NamedTuple

from wherry_shared.errors import FailedPrecondition

from .names import show
from .xattrs import NONE, Xattrs

BLOCK = 512
REGULAR, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
END = bytes(2 * BLOCK)

_NAME_MAX = 100  # ustar's prefix is left unused: a PAX record says the same and has no rules of its own
_ID_MAX = 0o7777777
_SIZE_MAX = 0o77777777777
_NANOSECONDS = 1_000_000_000
_MAGIC = b"ustar\x0000" + bytes(64)
_NO_DEVICE = b"0000000\x000000000\0" + bytes(167)
_NO_LINK = bytes(100)
_PAX_NAME = b"PaxHeaders/entry"
_REMEMBERED = 1 << 12


class Meta(NamedTuple):
    """What an entry says beside its body. `mtime` is nanoseconds and not negative; `device` is st_rdev."""

    name: bytes
    kind: bytes
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    link: bytes = b""
    device: int = 0
    xattrs: Xattrs = NONE


class Headers:
    """Makes headers; what repeats from entry to entry is remembered."""

    def __init__(self) -> None:
        self._owners: dict[tuple[int, int, int], bytes] = {}
        self._pax: dict[int, bytes] = {}

    def make(self, meta: Meta) -> bytes:
        """The header blocks of an entry; its body comes next, padded to whole blocks.

        FailedPrecondition: an extended attribute's name cannot be written.
        """
        seconds, nanoseconds = divmod(meta.mtime, _NANOSECONDS)
        name, link, size = meta.name, meta.link, meta.size
        records = b""
        if len(name) > _NAME_MAX:
            records += record(b"path", name)
            name = name[:_NAME_MAX]
        if len(link) > _NAME_MAX:
            records += record(b"linkpath", link)
            link = link[:_NAME_MAX]
        if nanoseconds:
            records += record(b"mtime", b"%d.%09d" % (seconds, nanoseconds))
        if meta.uid > _ID_MAX:
            records += record(b"uid", b"%d" % meta.uid)
        if meta.gid > _ID_MAX:
            records += record(b"gid", b"%d" % meta.gid)
        if size > _SIZE_MAX:
            records += record(b"size", b"%d" % size)
        if seconds > _SIZE_MAX:
            records += record(b"mtime", b"%d" % seconds) if not nanoseconds else b""
            seconds = 0
        if meta.xattrs:
            records += _xattrs(meta)
        owner = self._owners.get((meta.mode, meta.uid, meta.gid)) or self._owner(meta)
        device = _device(meta.device) if meta.device else _NO_DEVICE
        block = _block(name, owner, size if size <= _SIZE_MAX else 0, seconds, meta.kind, link, device)
        return self._extended(records) + block if records else block

    def _owner(self, meta: Meta) -> bytes:
        if len(self._owners) >= _REMEMBERED:
            self._owners.clear()
        uid, gid = (number if number <= _ID_MAX else 0 for number in (meta.uid, meta.gid))
        field = self._owners[meta.mode, meta.uid, meta.gid] = b"%07o\0%07o\0%07o\0" % (meta.mode, uid, gid)
        return field

    def _extended(self, records: bytes) -> bytes:
        """A PAX header: its own ustar header depends on nothing but the length."""
        size = len(records)
        block = self._pax.get(size)
        if block is None:
            if len(self._pax) >= _REMEMBERED:
                self._pax.clear()
            owner = b"0000644\x000000000\x000000000\0"
            block = self._pax[size] = _block(_PAX_NAME, owner, size, 0, b"x", b"", _NO_DEVICE)
        return block + records + bytes(-size % BLOCK)


def record(keyword: bytes, value: bytes) -> bytes:
    """One record, `length keyword=value` and a newline: the length counts itself."""
    size = len(keyword) + len(value) + 3
    length = size + len(str(size))
    if len(str(length)) != len(str(size)):
        length = size + len(str(length))
    return b"%d %b=%b\n" % (length, keyword, value)


def padding(size: int) -> bytes:
    """What fills a body of `size` bytes up to whole blocks."""
    return bytes(-size % BLOCK)


def _block(name: bytes, owner: bytes, size: int, seconds: int, kind: bytes, link: bytes, device: bytes) -> bytes:
    head = name.ljust(_NAME_MAX, b"\0") + owner + b"%011o\0%011o\0" % (size, seconds)
    tail = kind + (link.ljust(_NAME_MAX, b"\0") if link else _NO_LINK) + _MAGIC + device
    # The sum of the bytes, the checksum's own field read as blanks. Adler-32's low half is that and one, modulo
    # 65521: with two names of a hundred bytes, and digits, it never gets that far.
    total = (zlib.adler32(tail, zlib.adler32(head)) & 0xFFFF) - 1 + 8 * 32
    return b"%b%06o\0 %b" % (head, total, tail)


def _device(number: int) -> bytes:
    return b"%07o\0%07o\0" % (os.major(number), os.minor(number)) + bytes(167)


def _xattrs(meta: Meta) -> bytes:
    records = b""
    for name, value in meta.xattrs:
        keyword = os.fsencode(name)
        if b"=" in keyword:
            raise FailedPrecondition(f"{show(meta.name)} has the xattr {show(keyword)}: no layer can hold this name")
        records += record(b"SCHILY.xattr." + keyword, value)
    return records
