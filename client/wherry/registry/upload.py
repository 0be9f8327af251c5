"""Blobs and manifests into a registry (OCI distribution specification, push): what is there is not sent again.

A small blob goes in one request, a large one in parts that resume where the registry says it is. An upload's location
is vetted like a redirect, and gets credentials only on the registry's own origin.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from wherry_shared.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from wherry_shared.values import Descriptor

from . import http
from .auth import Access
from .transport import Call, Transport
from .wire import Transient, Wire

WHOLE_MAX = 8 << 20
"""Blobs up to so many bytes go in one request."""
PART = 32 << 20
"""Bytes of one part of a larger one."""
MOUNTS_MAX = 3
"""Repositories that are asked to lend a blob."""
_BYTES = "application/octet-stream"
_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,19})")

Outcome = Literal["exists", "mounted", "uploaded"]
OnSent = Callable[[int], None]


class Source(Protocol):
    """Where the bytes of a blob come from."""

    def __call__(self, offset: int) -> AsyncGenerator[bytes, None]:
        """The bytes from `offset` to the end."""
        ...


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob to send. `sources`: repositories of the same registry that may have it."""

    digest: str
    size: int
    read: Source
    sources: Sequence[str] = ()


class Upload:
    """Puts blobs and manifests into one repository."""

    def __init__(self, wire: Wire, transport: Transport, access: Access) -> None:
        self._wire = wire
        self._transport = transport
        self._access = access
        self._host = access.origin.authority

    async def has(self, path: str, digest: str, accept: str = "*/*") -> bool:
        """Whether `blobs/...` or `manifests/...` is there, and is that digest."""
        what = f"{path.partition('/')[0].removesuffix('s')} {digest}"
        call = Call("HEAD", {"Accept": accept}, accept=(200, 404))

        async def attempt() -> bool:
            response = await self._transport.call(self._access, self._access.url(path), call, what)
            async with response:
                await response.release()
                named = response.headers.get("Docker-Content-Digest", digest)
                return response.status == 200 and named == digest

        return await self._wire.persist(attempt, self._host)

    async def blob(self, blob: Blob, on_sent: OnSent) -> Outcome:
        """Send a blob unless it is there, or a neighbour lends it; `on_sent` is told how many bytes are."""
        if await self.has(f"blobs/{blob.digest}", blob.digest):
            return "exists"
        location = await self._mount(blob)
        if location is None:
            return "mounted"
        await _Transfer(self, blob, on_sent).run(location)
        return "uploaded"

    async def manifest(self, descriptor: Descriptor, data: bytes, tag: str = "") -> None:
        """Put a manifest or index under its digest, or under a tag."""
        path = f"manifests/{tag or descriptor.digest}"
        what = f"manifest {descriptor.digest}"
        if await self.has(path, descriptor.digest, descriptor.media_type):
            return
        call = Call("PUT", {"Content-Type": descriptor.media_type}, data, accept=(200, 201, 202))

        async def attempt() -> None:
            async with await self._transport.call(self._access, self._access.url(path), call, what) as response:
                await response.release()
                self.check(response, descriptor.digest)

        await self._wire.persist(attempt, self._host)

    def check(self, response: http.Response, digest: str) -> None:
        """DataLoss when the registry says that it stored something else."""
        if response.headers.get("Docker-Content-Digest", digest) != digest:
            raise DataLoss(f"{self._host} stored something else than {digest}")

    # ---- opening

    async def _mount(self, blob: Blob) -> str | None:
        """None when a neighbour's blob was mounted, else the location of a fresh upload."""
        for source in [name for name in blob.sources if name != self._access.repository][:MOUNTS_MAX]:
            try:
                location = await self.open(blob, source)
            except (Unauthenticated, PermissionDenied, NotFound, InvalidArgument, FailedPrecondition):
                continue  # no right to that neighbour, or it is none
            return location
        return await self.open(blob)

    async def open(self, blob: Blob, source: str = "") -> str | None:
        """The location of a fresh upload; None when `source` lent the blob."""
        access = replace(self._access, source=source)
        rest = f"blobs/uploads/?mount={blob.digest}&from={source}" if source else "blobs/uploads/"
        call = Call("POST", {"Accept": "*/*"}, b"", accept=(201, 202) if source else (202,))
        what = f"an upload of {blob.digest}"

        async def attempt() -> str | None:
            async with await self._transport.call(access, access.url(rest), call, what) as response:
                await response.release()
                if response.status == 201:
                    self.check(response, blob.digest)
                    return None
                return await self.follow(response)

        return await self._wire.persist(attempt, self._host)

    async def follow(self, response: http.Response) -> str:
        """Where an upload goes on, vetted."""
        location = response.headers.get("Location", "")
        if not location:
            raise FailedPrecondition(f"{self._host} opened an upload and does not say where")
        return await self._transport.locate(self._access, response.url, location)

    async def call(self, url: str, call: Call, what: str) -> http.Response:
        """One attempt of a request to an upload's location."""
        return await self._transport.call(self._access, url, call, what)


class _Transfer:
    """The bytes of one blob, to one location after the other."""

    def __init__(self, upload: Upload, blob: Blob, on_sent: OnSent) -> None:
        self._upload = upload
        self._blob = blob
        self._on_sent = on_sent
        self._what = f"blob {blob.digest}"
        self._wire = upload._wire
        self._failures = 0  # in a row, of requests
        self._restarts = 0

    async def run(self, location: str) -> None:
        """Send all of it and have it verified."""
        at: str | None = location
        while True:
            try:
                await self._once(at or location)
                return
            except _Again as e:
                self._restarts += 1
                self._failures = 0
                await self._wire.back_off(e.reason, self._restarts)
            at = await self._upload.open(self._blob)

    async def _once(self, location: str) -> None:
        if self._blob.size <= WHOLE_MAX:
            await self._put(location, 0)
            return
        try:
            location, offset = await self._step(location, 0)
        except (Unimplemented, InvalidArgument, FailedPrecondition):
            # Some registries take no parts: all in one request, into an upload of its own.
            location = await self._upload.open(self._blob) or location
            await self._put(location, 0)
            return
        while offset < self._blob.size:
            location, offset = await self._step(location, offset)
        await self._put(location, offset)

    async def _step(self, location: str, offset: int) -> tuple[str, int]:
        """One more part; after trouble from where the registry is."""
        try:
            location, reached = await self._part(location, offset)
        except OutOfRange as e:
            reason = Transient(Unavailable(e.message))
        except Transient as e:
            reason = e
        else:
            if reached > offset:
                self._failures = 0
                return location, reached
            reason = Transient(Unavailable(f"{self._upload._host} takes no more of {self._what}"))
        self._failures += 1
        await self._wire.back_off(reason, self._failures)
        return await self._where(location, reason)

    async def _part(self, location: str, offset: int) -> tuple[str, int]:
        size = min(PART, self._blob.size - offset)
        body = http.Body(size, lambda: self._bytes(offset, size))
        headers = {"Content-Type": _BYTES, "Content-Range": f"{offset}-{offset + size - 1}"}
        call = Call("PATCH", headers, body, accept=(202,))
        async with await self._upload.call(location, call, self._what) as response:
            await response.release()
            return await self._upload.follow(response), self._reached(response, offset + size, offset + size)

    async def _where(self, location: str, reason: Transient) -> tuple[str, int]:
        """How far the registry is. _Again: it does not know the upload any more."""
        call = Call("GET", {"Accept": "*/*"}, accept=(200, 202, 204))

        async def attempt() -> tuple[str, int]:
            async with await self._upload.call(location, call, self._what) as response:
                await response.release()
                at = await self._upload.follow(response) if "Location" in response.headers else location
                return at, self._reached(response, 0, self._blob.size)

        try:
            return await self._wire.persist(attempt, self._upload._host)
        except (NotFound, FailedPrecondition, InvalidArgument):
            raise _Again(reason) from None

    def _reached(self, response: http.Response, default: int, most: int) -> int:
        """How many bytes the registry has. `0-0` is what an empty upload says, too."""
        match = _RANGE.fullmatch(response.headers.get("Range", ""))
        if match is None:
            return default
        reached = int(match[1]) + 1 if int(match[1]) else 0
        if reached > most:
            raise DataLoss(f"{self._upload._host} has more bytes of {self._what} than were sent")
        return reached

    async def _put(self, location: str, offset: int) -> None:
        """The last request: what is left, and the digest that the whole must have."""
        size = self._blob.size - offset
        body = http.Body(size, lambda: self._bytes(offset, size)) if size else b""
        sign = "&" if "?" in location else "?"
        call = Call("PUT", {"Content-Type": _BYTES}, body, accept=(200, 201, 204))
        try:
            async with await self._upload.call(
                f"{location}{sign}digest={self._blob.digest}", call, self._what
            ) as response:
                await response.release()
                self._upload.check(response, self._blob.digest)
        except Transient as e:
            if await self._upload.has(f"blobs/{self._blob.digest}", self._blob.digest):
                return  # it had taken effect, and only its answer was lost
            raise _Again(e) from None
        except (NotFound, OutOfRange) as e:  # the registry lost the upload, or its place in it
            raise _Again(Transient(Unavailable(e.message))) from None

    async def _bytes(self, offset: int, size: int) -> AsyncIterable[bytes]:
        sent = 0
        async with aclosing(self._blob.read(offset)) as chunks:
            async for chunk in chunks:
                part = chunk[: size - sent]
                yield part
                sent += len(part)
                self._on_sent(offset + sent)
                if sent == size:
                    return


class _Again(Exception):
    """The upload is lost: begin another one."""

    def __init__(self, reason: Transient) -> None:
        super().__init__(str(reason))
        self.reason = reason
