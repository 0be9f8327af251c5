"""One blob as a stream that survives dropped connections and believes nothing it is told.

Resumption by bounded Range requests (RFC 9110 §14). A download ends with exactly the descriptor's size, or raises.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Protocol

from wherry_shared.errors import DataLoss, InvalidArgument, OutOfRange, Unavailable
from wherry_shared.values import Descriptor

from . import http
from .wire import Pace, Transient, Wire, failure

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(?:(\d{1,19})|\*)")

Open = Callable[[Mapping[str, str]], Awaitable[http.Response]]
"""request headers -> an answer with status 200 or 206; raises Transient or a typed error."""


Piece = bytes | memoryview
PIECE = 1 << 20

Host = Callable[[], str]
"""The host that answers at the moment, as messages name it."""


class Hasher(Protocol):
    """The part of hashlib's objects that is used."""

    def update(self, data: Piece, /) -> None:
        """Take in bytes."""
        ...

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        ...


def hasher_for(digest: str) -> Hasher:
    """A fresh hash of the digest's own algorithm: never a header's."""
    return hashlib.new(digest.partition(":")[0], usedforsecurity=True)


def check_digest_of(hasher: Hasher, digest: str, host: str) -> None:
    """DataLoss unless `hasher` saw the bytes that `digest` names."""
    if hasher.hexdigest() != digest.partition(":")[2]:
        raise DataLoss(f"{host} sent other bytes than {digest}")


class Download:
    """The state of one transfer: `position` counts bytes handed to the consumer, from the blob's start."""

    def __init__(
        self, wire: Wire, open_: Open, descriptor: Descriptor, host: Host, offset: int, hasher: Hasher | None, *,
        reuse: bool = False,
    ) -> None:  # fmt: skip
        if not 0 <= offset <= descriptor.size:
            raise OutOfRange(f"offset {offset} is outside of {descriptor.digest}, which has {descriptor.size} bytes")
        self._wire = wire
        self._open = open_
        self._digest = descriptor.digest
        self._size = descriptor.size
        self._name = host
        self._hasher = hasher
        self._pace = Pace(wire.limits, host())
        self._failures = 0
        self._mark = self.position = offset
        self._discarded = False
        self._memory = _Memory() if reuse else None

    @property
    def _host(self) -> str:
        return self._name()

    async def chunks(self) -> AsyncGenerator[Piece, None]:
        """The bytes from the offset to the end, in pieces as the network brought them (up to 2 MiB).

        With `reuse` they are views of PIECE bytes at most, each good until the one after the next is asked for.
        """
        while self.position < self._size:
            try:
                async with await self._answer() as response, aclosing(self._body(response)) as body:
                    async for chunk in body:
                        yield chunk
            except Transient as e:
                if self.position < self._size:  # all bytes are there: how the connection ended does not matter
                    await self._retry(e)
        if self._hasher is not None:
            check_digest_of(self._hasher, self._digest, self._host)

    async def _body(self, response: http.Response) -> AsyncGenerator[Piece, None]:
        skip = self._to_skip(response)
        while chunk := await self._read(response):
            if skip:
                chunk, skip = chunk[skip:], max(0, skip - len(chunk))
                if not chunk:
                    continue
            if self.position + len(chunk) > self._size:
                raise DataLoss(f"{self._host} sent more than the {self._size} bytes of {self._digest}")
            if self._hasher is not None:
                self._hasher.update(chunk)
            self.position += len(chunk)
            yield chunk
        if self.position < self._size:
            short = f"{self._host} sent {self.position} of the {self._size} bytes of {self._digest}"
            raise Transient(DataLoss(short))

    async def _answer(self) -> http.Response:
        # The first request of a whole blob goes without Range: caches before registries like it better.
        if self.position == 0:
            return await self._open({})
        try:
            return await self._open({"Range": f"bytes={self.position}-{self._size - 1}"})
        except OutOfRange:
            raise DataLoss(f"{self._host} has fewer than the {self._size} bytes of {self._digest}") from None

    def _to_skip(self, response: http.Response) -> int:
        """Bytes of the answer to leave out; raises where the headers contradict the descriptor or the request."""
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise DataLoss(f"{self._host} sent {self._digest} in an encoding that was not asked for")
        if response.status == 206:
            expected, skip = self._range_length(response), 0
        else:
            expected, skip = self._size, self.position
            if skip and self._discarded:
                # Discarding again and again would make a bad connection cost the square of the size.
                raise Unavailable(f"{self._host} does not serve ranges, and the connection does not last for the blob")
            self._discarded = skip > 0
        if response.content_length not in (None, expected):
            raise DataLoss(
                f"{self._host} announced {response.content_length} bytes of {self._digest} where {expected} are due"
            )
        return skip

    def _range_length(self, response: http.Response) -> int:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or self.position == 0:
            raise DataLoss(f"{self._host} sent a part of {self._digest} that does not say which, or was not asked for")
        first, last, total = int(match[1]), int(match[2]), int(match[3] or self._size)
        if first != self.position or not first <= last < self._size or total != self._size:
            raise DataLoss(f"{self._host} sent another part of {self._digest} than was asked for")
        return last - first + 1

    async def _read(self, response: http.Response) -> Piece:
        now = asyncio.get_running_loop().time
        before = now()
        try:
            chunk = await (response.readany() if self._memory is None else self._memory.read(response))
        except (TimeoutError, http.HttpError, OSError) as e:
            raise failure(self._host, e) from None
        if chunk:
            self._pace.note(now() - before, len(chunk))
        return chunk

    async def _retry(self, reason: Transient) -> None:
        if self.position - self._mark >= self._wire.limits.progress:
            self._failures = 0
        self._mark = self.position
        self._failures += 1
        await self._wire.back_off(reason, self._failures)


class _Memory:
    """Two blocks that pieces are received into by turns: to have new ones all the time costs more than to receive."""

    def __init__(self) -> None:
        self._blocks = [memoryview(bytearray(PIECE)) for _ in range(2)]
        self._given = [memoryview(b""), memoryview(b"")]

    async def read(self, response: http.Response) -> memoryview:
        """The next piece, empty at the end. The one before the last is good no longer: using it is a ValueError."""
        self._blocks.reverse()
        self._given.reverse()
        self._given[0].release()
        count = await response.readinto(self._blocks[0])
        self._given[0] = self._blocks[0][:count]
        return self._given[0]


def make_hasher(verify: bool | Hasher, digest: str, offset: int) -> Hasher | None:
    """The hash that a download checks itself with, if any. InvalidArgument for True in the middle of a blob."""
    if verify is False:
        return None
    if verify is not True:
        return verify
    if offset:
        raise InvalidArgument(f"{digest} cannot be verified from offset {offset} without a hash of what precedes it")
    return hasher_for(digest)
