"""The diff service's header writer: what it writes, its reader reads as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

from wherry_diff import headers
from wherry_diff.headers import Headers, Meta
from wherry_diff.limits import Limits
from wherry_diff.tar import Reader, Stream
from wherry_shared.errors import FailedPrecondition

from ..given import Given

KINDS = (headers.REGULAR, headers.LINK, headers.SYMLINK, headers.CHAR, headers.BLOCK_DEVICE, headers.DIRECTORY)


def seeds() -> Iterator[bytes]:
    yield from (bytes([kind]) + bytes(range(80)) * 2 for kind in range(6))


def one(data: bytes) -> None:
    given = Given(data)
    writer = Headers()
    metas = given.some(3, lambda: _meta(given))
    written, kept = b"", []
    for meta in metas:
        try:
            written += writer.make(meta)
        except FailedPrecondition:
            assert any("=" in name for name, _ in meta.xattrs)
            continue
        kept.append(meta)
    reader = Reader(Stream(iter([written + headers.END])), Limits())
    for meta in kept:
        entry = reader.next()
        assert entry is not None
        reader.left, reader._padding = 0, 0  # no bodies were written
        assert (entry.name, entry.kind, entry.mode) == (meta.name, meta.kind, meta.mode)
        assert (entry.uid, entry.gid, entry.mtime) == (meta.uid, meta.gid, meta.mtime)
        assert entry.link == meta.link and sorted(entry.xattrs or []) == sorted(
            (os.fsencode(name), value) for name, value in meta.xattrs
        )
        if meta.kind == headers.REGULAR:
            assert entry.size == meta.size
        if entry.device is not None:
            assert os.makedev(*entry.device) == meta.device
    assert reader.next() is None


def _meta(given: Given) -> Meta:
    kind = given.one_of(KINDS)
    device = kind in (headers.CHAR, headers.BLOCK_DEVICE)
    return Meta(
        name=_name(given), kind=kind, mode=given.number(0o10000), uid=given.number(2**32 - 1),
        gid=given.number(2**32 - 1), size=given.number(1 << 40) if kind == headers.REGULAR else 0,
        mtime=given.number(1 << 63), link=_name(given) if kind in (headers.LINK, headers.SYMLINK) else b"",
        device=os.makedev(given.number(1 << 12), given.number(1 << 20)) if device else 0,
        xattrs=tuple(dict(given.some(3, lambda: _xattr(given))).items()),
    )  # fmt: skip


def _name(given: Given) -> bytes:
    raw = given.bytes(given.number(120)).translate(None, b"\0/.")
    return b"n" + raw * given.one_of((1, 2))


def _xattr(given: Given) -> tuple[str, bytes]:
    name = given.bytes(given.number(12)).replace(b"\0", b"")
    return os.fsdecode(b"user." + name), given.bytes(given.number(40))
