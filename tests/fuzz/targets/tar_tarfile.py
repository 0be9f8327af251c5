"""The diff service's tar reader beside Python's tarfile: what tarfile writes is read as it was meant."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

from wherry_diff.limits import Limits
from wherry_diff.names import clean
from wherry_diff.tar import REGULAR, Entry, Reader, Stream

from ..given import Given

KINDS = (
    tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)  # fmt: skip
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
LETTERS = "ab./-é "


def seeds() -> Iterator[bytes]:
    yield from (bytes([form]) + bytes(range(kind, kind + 60)) * 3 for form in range(3) for kind in range(7))


def one(data: bytes) -> None:
    given = Given(data)
    form = given.one_of(FORMATS)
    file = io.BytesIO()
    members: list[tuple[tarfile.TarInfo, bytes]] = []
    with tarfile.open(fileobj=file, mode="w", format=form, encoding="utf-8") as out:
        for info, body in given.some(5, lambda: _member(given)):
            try:
                out.addfile(info, io.BytesIO(body))
            except ValueError:  # ustar has no room for this one
                continue
            members.append((info, body))
    reader = Reader(Stream(iter([file.getvalue()])), Limits())
    for info, body in members:
        entry = reader.next()
        assert entry is not None
        _same(entry, info, form)
        assert b"".join(iter(lambda: bytes(reader.take(reader.left)) if reader.left else b"", b"")) == body
    assert reader.next() is None


def _member(given: Given) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(_name(given))
    info.type = given.one_of(KINDS)
    info.mode, info.uid, info.gid = given.number(0o10000), given.number(1 << 32) % (2**32 - 1), given.number(1 << 20)
    info.mtime = given.number(1 << 32)
    if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = _name(given)
    if info.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        info.devmajor, info.devminor = given.number(1 << 12), given.number(1 << 20)
    body = given.bytes(given.number(600)) if info.type == tarfile.REGTYPE else b""
    info.size = len(body)
    return info, body


def _name(given: Given) -> str:
    letters = [given.one_of(LETTERS) for _ in range(given.number(12))]
    return "n" + "".join(letters) * given.one_of((1, 1, 1, 9)) + "n"


def _same(entry: Entry, info: tarfile.TarInfo, form: int) -> None:
    assert entry.name == clean(info.name.encode()), (entry, info)
    assert (entry.kind, entry.mode, entry.uid, entry.gid) == (info.type, info.mode, info.uid, info.gid)
    assert entry.mtime == int(info.mtime) * 1_000_000_000
    if entry.kind == REGULAR:
        assert entry.size == info.size
    if info.linkname:
        assert entry.link == info.linkname.encode()
    if entry.device:
        assert entry.device == (info.devmajor, info.devminor)
