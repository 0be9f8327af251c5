"""HTTP/1.1 as a client: a pool of connections, and the answers that come over them.

Nothing here knows of redirects, credentials or retries.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, cast

import h11

from .connection import (
    Body,
    CertificateError,
    ConnectError,
    Connection,
    Dropped,
    HttpError,
    ProtocolError,
    TlsError,
)

__all__ = [
    "Body",
    "CertificateError",
    "ConnectError",
    "Dropped",
    "Headers",
    "HttpError",
    "Pool",
    "ProtocolError",
    "Response",
    "Target",
    "Timeouts",
    "TlsError",
]

DRAIN_MAX = 64 << 10
DRAIN_SECONDS = 1.0
KEEP = 16
KEEP_SECONDS = 15.0
STAGGER = 0.25
"""Seconds that one address of a host has before the next one is tried beside it (RFC 8305)."""
_SAFE = frozenset({"GET", "HEAD", "POST", "PUT"})


@dataclass(frozen=True, slots=True)
class Target:
    """Where a connection goes: scheme, host and port, and the TLS context if it is https."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to be connected; from the end of a request to its answer's head; of silence inside a body."""

    connect: float
    head: float
    idle: float


class Headers(Mapping[str, str]):
    """Header fields by name, case-insensitive; several of one name are joined (RFC 9110 §5.3)."""

    def __init__(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        self._pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in pairs]

    def __getitem__(self, name: str) -> str:
        found = self.all(name)
        if not found:
            raise KeyError(name)
        return ", ".join(found)

    def all(self, name: str) -> list[str]:
        """Each value of a name."""
        wanted = name.lower()
        return [value for key, value in self._pairs if key == wanted]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for name, _ in self._pairs))

    def __len__(self) -> int:
        return len({name for name, _ in self._pairs})


class Response:
    """The answer to one request. Close it, or use it inside `async with`; read to its end it closes itself."""

    def __init__(self, head: h11.Response, url: str, connection: Connection, done: Callable[[bool], None]) -> None:
        self.status: int = head.status_code
        self.url = url
        self.headers = Headers(cast("Sequence[tuple[bytes, bytes]]", head.headers))
        self._connection = connection
        self._done = done
        self._open = True
        self.idle = 0.0

    @property
    def content_length(self) -> int | None:
        """The announced length of the body, None without one."""
        value = self.headers.get("Content-Length", "")
        return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None

    async def readany(self) -> bytes:
        """The next bytes of the body, b"" at its end. TimeoutError after `idle` seconds of silence."""
        if not self._open:
            return b""
        try:
            event = await self._connection.event(self.idle)
        except BaseException:
            self.close()
            raise
        if isinstance(event, h11.Data):
            return bytes(event.data)
        self._open = False
        self._done(True)
        return b""

    async def readinto(self, view: memoryview) -> int:
        """The next bytes of the body into `view`, without a copy on the way where its length is known; 0 at its end.

        Answers when it is full, or the first bytes have waited a moment. TimeoutError after `idle` seconds of silence.
        """
        if not self._open:
            return 0
        try:
            count = await self._connection.read_into(view, self.idle)
        except BaseException:
            self.close()
            raise
        if not count:
            self._open = False
            self._done(True)
        return count

    async def release(self) -> None:
        """Give the connection back if the rest of the body is short and near, else close it."""
        total = 0
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while total <= DRAIN_MAX and (chunk := await self.readany()):
                    total += len(chunk)
        except (TimeoutError, HttpError):
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Let go; what was not read is lost, and the connection with it."""
        if self._open:
            self._open = False
            self._done(False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Pool:
    """Connections that are kept for the next request to the same target."""

    def __init__(self, addresses: Callable[[str], Sequence[str]], timeouts: Timeouts) -> None:
        self._addresses = addresses
        self._timeouts = timeouts
        self._idle: dict[Target, list[Connection]] = {}
        self._all: set[Connection] = set()
        self._closed = False

    def close(self) -> None:
        """End every connection."""
        self._closed = True
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._idle.clear()

    async def request(
        self, method: str, target: Target, url: str, path: str, headers: Mapping[str, str],
        body: bytes | Body | None = None,
    ) -> Response:  # fmt: skip
        """Send a request and answer its response once the head is there, whatever its status.

        TimeoutError, or an HttpError. A kept connection that turns out to have ended is replaced, where repeating
        does no harm.
        """
        size = body.size if isinstance(body, Body) else len(body) if body is not None else None
        fields = [*headers.items()] + ([("Content-Length", str(size))] if size is not None else [])
        try:
            request = h11.Request(method=method, target=path, headers=fields)
        except h11.LocalProtocolError:
            raise ValueError("not a valid request") from None
        again = method in _SAFE and not isinstance(body, Body)
        while True:
            connection, kept = await self._take(target)
            try:
                return await self._exchange(connection, target, request, url, body)
            except Dropped:
                if not (kept and again):
                    raise

    async def _exchange(
        self, connection: Connection, target: Target, request: h11.Request, url: str, body: bytes | Body | None
    ) -> Response:
        try:
            await connection.send(request, body, self._timeouts.idle)
            async with asyncio.timeout(self._timeouts.head):
                head = await connection.head(request.method == b"GET")
        except BaseException:
            self._drop(connection)
            raise
        response = Response(head, url, connection, lambda whole: self._back(target, connection, whole=whole))
        response.idle = self._timeouts.idle
        return response

    async def _take(self, target: Target) -> tuple[Connection, bool]:
        idle = self._idle.get(target, [])
        while idle:
            connection = idle.pop()
            if connection.usable and time.monotonic() - connection.idle_since < KEEP_SECONDS:
                return connection, True
            self._drop(connection)
        async with asyncio.timeout(self._timeouts.connect):
            connection = await self._dial(target)
        if self._closed:
            connection.close()
            raise ConnectError("the pool is closed")
        self._all.add(connection)
        return connection, False

    def _drop(self, connection: Connection) -> None:
        self._all.discard(connection)
        connection.close()

    def _back(self, target: Target, connection: Connection, *, whole: bool) -> None:
        """An answer was read to its end, or let go of."""
        idle = self._idle.setdefault(target, [])
        if not whole or self._closed or len(idle) >= KEEP or not connection.renew():
            self._drop(connection)
            return
        connection.idle_since = time.monotonic()
        idle.append(connection)

    async def _dial(self, target: Target) -> Connection:
        """The first of the host's addresses that answers; each one has a head start before the next."""
        addresses = list(self._addresses(target.host))
        if len(addresses) == 1:
            return await self._connect(addresses[0], target)
        error: BaseException = ConnectError("no address")
        pending: set[asyncio.Task[Connection]] = set()
        try:
            while addresses or pending:
                if addresses:
                    pending.add(asyncio.create_task(self._connect(addresses.pop(0), target)))
                wait = STAGGER if addresses else None
                done, pending = await asyncio.wait(pending, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    reason = task.exception()
                    if reason is None:
                        return task.result()
                    error = reason
        finally:
            for task in pending:
                task.cancel()
        raise error

    @staticmethod
    async def _connect(address: str, target: Target) -> Connection:
        loop = asyncio.get_running_loop()
        name = target.host if target.tls is not None else None
        try:
            _, connection = await loop.create_connection(
                Connection, address, target.port, ssl=target.tls, server_hostname=name
            )
        except ssl.SSLCertVerificationError as e:
            raise CertificateError(e.verify_message or "verification failed") from None
        except ssl.SSLError:
            raise TlsError("no TLS connection") from None
        except OSError as e:
            raise ConnectError(e.strerror or "connection failed") from None
        return connection
