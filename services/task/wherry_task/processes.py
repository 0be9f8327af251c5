"""Processes as they are asked for: in the request, or in content where they are too long for one; and how long they
may be for the kernel."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from wherry_shared.api.content import Content
from wherry_shared.api.task import PROCESS_MAX
from wherry_shared.contract import DEPTH_MAX, deeper_than, unpack
from wherry_shared.errors import DataLoss, InvalidArgument, ResourceExhausted
from wherry_shared.streams import read_blob
from wherry_shared.values import check_digest

# Lists, maps and what is in them: more arguments than the kernel takes with 8 MiB of stack (9 bytes each of 2 MiB).
_ENTRIES_MAX = 1 << 18
# Each may take 64 MiB of memory while it is looked at and written down.
_PARALLEL = 4
# execve's bounds: of one string, and of all with their pointers, whatever the stack's limit is.
_STRING_MAX = 32 * os.sysconf("SC_PAGE_SIZE")
_ALL_MIN, _ALL_MAX, _POINTER = 128 << 10, 6 << 20, 8


class Processes:
    """What `exec` is to run."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._slots = asyncio.Semaphore(_PARALLEL)

    @asynccontextmanager
    async def given(self, process: dict[str, Any], digest: str) -> AsyncIterator[dict[str, Any]]:
        """The specification that a request has or names.

        InvalidArgument: it has and names one, or what it names is none. NotFound, DataLoss: of the blob.
        ResourceExhausted: over PROCESS_MAX.
        """
        if not digest:
            yield process
            return
        if process:
            raise InvalidArgument("a process and the digest of one are given: one of them is enough")
        async with self._slots:
            yield await self._fetch(check_digest(digest))

    async def _fetch(self, digest: str) -> dict[str, Any]:
        size = (await self._content.info(digest)).size
        if size > PROCESS_MAX:
            raise ResourceExhausted(f"process {digest} takes {size} bytes, and at most {PROCESS_MAX} fit")
        async with aclosing(read_blob(self._content, digest, verify=True)) as chunks:
            data = b"".join([chunk async for chunk in chunks])
        try:
            return decode(data)
        except InvalidArgument as e:
            raise InvalidArgument(f"process {digest}: {e}") from None


def decode(data: bytes) -> dict[str, Any]:
    """A process by its document. InvalidArgument."""
    try:
        found = unpack(data, entries=_ENTRIES_MAX)
    except DataLoss as e:
        raise InvalidArgument(str(e)) from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InvalidArgument("it is no map by names")
    if deeper_than(found, DEPTH_MAX):
        raise InvalidArgument(f"it is nested deeper than {DEPTH_MAX} levels")
    return found


def check_arguments(process: Any) -> None:
    """InvalidArgument: more than the kernel executes. A runtime tells that only when the process counts as started.

    What is no list, string or number here is the runtime's to refuse.
    """
    if not isinstance(process, dict):
        return
    strings = [each for each in _list(process, "args") + _list(process, "env") if isinstance(each, str)]
    sizes = [len(each if each.isascii() else each.encode()) + 1 for each in strings]
    longest, every, most = max(sizes, default=0), sum(sizes) + _POINTER * len(sizes), _all_max(process)
    if longest > _STRING_MAX:
        raise InvalidArgument(f"exec: argument list too long: one takes {longest} bytes, at most {_STRING_MAX} fit")
    if every > most:
        raise InvalidArgument(f"exec: argument list too long: it takes {every} bytes, at most {most} fit")


def _all_max(process: dict[str, Any]) -> int:
    """A quarter of the stack that it may have: by its own limits, else by ours, which its runtime inherits."""
    stack: Any = resource.getrlimit(resource.RLIMIT_STACK)[0]
    for limit in _list(process, "rlimits"):
        if isinstance(limit, dict) and limit.get("type") == "RLIMIT_STACK":
            stack = limit.get("soft")
    return max(_ALL_MIN, min(_ALL_MAX, stack // 4)) if isinstance(stack, int) and stack >= 0 else _ALL_MAX


def _list(process: dict[str, Any], name: str) -> list[Any]:
    found = process.get(name)
    return found if isinstance(found, list) else []
