"""Writes archives byte by byte, also those that no tool would write, and looks at trees."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from wherry_diff.apply import Applied, apply
from wherry_diff.extract import Target
from wherry_diff.limits import DEFAULT, Limits

TAR = "application/vnd.oci.image.layer.v1.tar"
TIME = 1_600_000_000
FILE, LINK, SYMLINK, CHAR, BLOCK, DIR, FIFO, GLOBAL = b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"g"


def octal(number: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, number)


def base256(number: int, width: int) -> bytes:
    return (
        (number % (1 << width * 8)).to_bytes(width, "big")
        if number < 0
        else b"\x80" + number.to_bytes(width - 1, "big")
    )


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def header(name: bytes, kind: bytes = FILE, size: int = 0, **fields: Any) -> bytes:
    """One header block; any field may be given as raw bytes, `checksum` too."""

    def number(field: str, width: int, otherwise: int) -> bytes:
        value = fields.get(field, otherwise)
        return value if isinstance(value, bytes) else octal(value, width)

    block = b"".join(
        (
            name[:100].ljust(100, b"\0"),
            number("mode", 8, 0o644), number("uid", 8, 0), number("gid", 8, 0),
            number("size", 12, size), number("mtime", 12, TIME),
            b" " * 8, kind, fields.get("link", b"")[:100].ljust(100, b"\0"),
            fields.get("magic", b"ustar\x0000").ljust(8, b"\0"), bytes(64),
            number("major", 8, 0), number("minor", 8, 0),
            fields.get("prefix", b"").ljust(155, b"\0"), bytes(12),
        )
    )  # fmt: skip
    block = fields.get("patch", lambda whole: whole)(block)
    checksum = fields.get("checksum", b"%06o\0 " % sum(block))
    return block[:148] + checksum + block[156:]


def record(keyword: bytes, value: bytes) -> bytes:
    body = b" " + keyword + b"=" + value + b"\n"
    length = len(body) + len(str(len(body)))
    while length != len(body) + len(str(length)):
        length = len(body) + len(str(length))
    return str(length).encode() + body


def pax(records: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]], kind: bytes = b"x") -> bytes:
    pairs = records.items() if isinstance(records, Mapping) else records
    payload = b"".join(record(keyword, value) for keyword, value in pairs)
    return header(b"pax", kind, len(payload)) + padded(payload)


def entry(name: bytes, kind: bytes = FILE, data: bytes = b"", **fields: Any) -> bytes:
    """A member; long names and links go into a PAX header by themselves, `pax=` adds to it."""
    records = dict(fields.pop("pax", {}))
    if len(name) > 100:
        records[b"path"] = name
    if len(fields.get("link", b"")) > 100:
        records[b"linkpath"] = fields["link"]
    if kind == DIR:
        fields.setdefault("mode", 0o755)
    fields.setdefault("size", len(data))
    before = pax(records) if records else b""
    return before + header(name, kind, **fields) + padded(data)


def archive(*members: bytes) -> bytes:
    return b"".join(members) + bytes(1024)


def put(
    data: bytes, root: os.PathLike[str] | str, *, overlay: bool = True, limits: Limits = DEFAULT, **target: Any
) -> Applied:
    """Apply an archive that stands in memory."""
    return apply([data], TAR, Target(os.fspath(root), overlay=overlay, **target), limits)


def look(root: os.PathLike[str] | str, *, times: bool = True) -> dict[bytes, tuple[object, ...]]:
    """All there is to a tree: type, mode, owner, device, time, contents, xattrs, and which names are one file."""
    found: dict[bytes, tuple[object, ...]] = {}
    groups: dict[int, bytes] = {}
    top = os.fsencode(root)
    todo = [b""]
    while todo:
        name = todo.pop()
        path = os.path.join(top, name)
        info = os.lstat(path)
        content: object = None
        if stat.S_ISREG(info.st_mode):
            with open(path, "rb") as file:
                content = hashlib.sha256(file.read()).hexdigest()
        elif stat.S_ISLNK(info.st_mode):
            content = os.readlink(path)
        elif stat.S_ISDIR(info.st_mode):
            todo += sorted((os.path.join(name, base) for base in os.listdir(path)), reverse=True)
        linked = not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
        }
        found[name] = (
            info.st_mode, info.st_uid, info.st_gid, info.st_rdev, content, xattrs,
            info.st_mtime_ns if times else None,
            groups.setdefault(info.st_ino, name) if linked else None,
        )  # fmt: skip
    return found
