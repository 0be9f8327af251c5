"""Image references, and what comes of them: what is accepted is its own normal form, and names no other place."""

from __future__ import annotations

from collections.abc import Iterator

from wherry.archive.names import annotations_of, familiar
from wherry.registry.hosts import HostRules, split_authority
from wherry.registry.reference import Reference
from wherry_shared.errors import InvalidArgument

TOKENS = (b"@sha256:", b"a" * 64, b"docker.io/", b"library/", b"localhost:5000/", b"[::1]:", b"..", b"//", b"__", b":")


def seeds() -> Iterator[bytes]:
    yield from (
        b"redis", b"a/b:c", b"localhost:5000/a/b:tag", b"[::1]:80/a", b"x.y/a__b/c-d@sha256:" + b"a" * 64,
        b"docker.io/library/redis:7@sha512:" + b"b" * 128, b"index.docker.io/a/b", b"example.com/../other/image",
    )  # fmt: skip


def one(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape" if len(data) % 2 else "replace")
    try:
        found = Reference.parse(text)
    except InvalidArgument:
        familiar(text)
        annotations_of(text)
        return
    assert Reference.parse(str(found)) == found and str(Reference.parse(str(found))) == str(found)
    assert ".." not in found.repository.split("/") and "/" not in found.registry and found.registry
    assert str(found).isascii() and not set(" \t\r\n%?#\\") & set(str(found))
    try:
        HostRules().endpoint(found.registry)
    except InvalidArgument:
        return
    host, port = split_authority(found.registry)
    assert host and (port is None or 0 < port < 65536)
    short = familiar(text)
    if short:
        assert Reference.parse(short).name == found.name
