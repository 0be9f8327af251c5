"""The client's reader of import archives, and where the links in them lead."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from typing import Any

from wherry.archive.tar import Reader, follow
from wherry_shared.errors import DataLoss, InvalidArgument, ResourceExhausted, Unimplemented

from .. import archives
from ..archives import summed

MAX_LEN = 8192
TOKENS = archives.TOKENS
seeds = archives.seeds
ALLOWED = (InvalidArgument, ResourceExhausted, Unimplemented, DataLoss)


def one(data: bytes) -> None:
    data = summed(data)
    assert now(walk(data, len(data) or 1)) == now(walk(data, 1 + (data[0] if data else 0)))


def now(coroutine: Coroutine[Any, Any, list[object]]) -> list[object]:
    """What it answers; it never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return list(end.value)
    raise AssertionError("it waits")


async def walk(data: bytes, size: int) -> list[object]:
    found: list[object] = []

    async def source() -> AsyncIterator[bytes]:
        for at in range(0, len(data), size):
            yield data[at : at + size]

    try:
        reader = Reader(source(), "it")
        async for entry in reader:
            found.append(entry)
            clean(entry.name)
            if entry.kind in ("hardlink", "symlink"):
                clean(follow(entry.name, entry.link, entry.kind))
            elif len(entry.name) % 2:
                found.append(await reader.read(1 << 16))
    except ALLOWED as error:
        found.append(type(error))
    return found


def clean(name: str) -> None:
    assert not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
