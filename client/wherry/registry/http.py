"""HTTP/1.1 as a client: a pool of connections, heads of bounded size, bodies at the pace of who reads or sends them.

h11 knows the protocol; here its bytes are moved. Nothing here knows of redirects, credentials or retries. Errors say
what happened and hold nothing that was sent.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import h11

HEAD_MAX = 64 << 10
"""Longest head of an answer, in bytes."""
READ_BUFFER = 1 << 20
"""Bytes that a connection may hold before it stops reading."""
DRAIN_MAX = 64 << 10
DRAIN_SECONDS = 1.0
KEEP = 16
KEEP_SECONDS = 15.0
STAGGER = 0.25
"""Seconds that one address of a host has before the next one is tried beside it (RFC 8305)."""
_SAFE = frozenset({"GET", "HEAD", "POST", "PUT"})


class HttpError(Exception):
    """Base of what goes wrong; the text is fit to be shown."""


class ConnectError(HttpError):
    """No connection was made."""


class CertificateError(HttpError):
    """The other end's certificate is not trusted."""


class TlsError(HttpError):
    """The other end does not speak TLS, or not as expected."""


class ProtocolError(HttpError):
    """The answer is not HTTP."""


class Dropped(HttpError):
    """The connection ended before the answer did."""


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


@dataclass(frozen=True, slots=True)
class Body:
    """What is sent: exactly `size` bytes, made afresh for each attempt."""

    size: int
    chunks: Callable[[], AsyncIterable[bytes]]


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


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_MAX)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._held = 0
        self._paused = False
        self._ended = False
        self._answered = False
        self.idle_since = 0.0

    # ---- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self._answered = True
        self._http.receive_data(data)
        self._held += len(data)
        if self._held > READ_BUFFER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._end(clean=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(clean=exc is None)
        self.resume_writing()

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def _end(self, *, clean: bool) -> None:
        if self._ended:
            return
        self._ended = True
        if clean:
            self._http.receive_data(b"")
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- the exchange's side

    @property
    def usable(self) -> bool:
        """Whether a request can be sent: nothing has come unasked."""
        fresh = self._http.our_state is h11.IDLE and not self._held
        return fresh and not self._ended and self._transport is not None and not self._transport.is_closing()

    async def send(self, request: h11.Request, body: bytes | Body | None, idle: float) -> None:
        """Send a request. Stops sending the body when the answer comes before its end."""
        self._answered = False
        head = self._http.send(request) or b""
        if isinstance(body, Body):
            self._write(head)
            if not await self._send_chunks(body, idle):
                return
            self._write(self._http.send(h11.EndOfMessage()) or b"")
            return
        data = (self._http.send(h11.Data(data=body)) or b"") if body else b""
        self._write(head + data + (self._http.send(h11.EndOfMessage()) or b""))
        await self._drain(idle)

    async def _send_chunks(self, body: Body, idle: float) -> bool:
        async for chunk in body.chunks():
            if self._answered:
                return False
            self._write(self._http.send(h11.Data(data=chunk)) or b"")
            await self._drain(idle)
        return not self._answered

    def _write(self, data: bytes) -> None:
        if self._ended or self._transport is None:
            if not self._answered:
                raise Dropped("the connection ended")
            return
        self._transport.write(data)

    async def _drain(self, idle: float) -> None:
        if self._writable is not None:
            async with asyncio.timeout(idle):
                await asyncio.shield(self._writable)
        if self._ended and not self._answered:
            raise Dropped("the connection ended")

    async def head(self) -> h11.Response:
        """The head of the answer; interim ones are passed over."""
        while True:
            event = await self.event(None)
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise ProtocolError("the answer has no head")

    async def event(self, idle: float | None) -> Any:
        """The next part of the answer."""
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as e:
                raise (Dropped if self._ended else ProtocolError)(str(e)[:200]) from None
            if event is not h11.NEED_DATA:
                if isinstance(event, h11.Data):
                    self._held = max(0, self._held - len(event.data))
                return event
            self._held = 0
            if self._ended:
                raise Dropped("the connection ended")
            await self._more(idle)

    async def _more(self, idle: float | None) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        try:
            async with asyncio.timeout(idle):
                await self._waiter
        finally:
            self._waiter = None

    def renew(self) -> bool:
        """Make ready for the next exchange; False when the connection cannot have one."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE or self._ended:
            return False
        unasked = bool(self._http.trailing_data[0])
        self._http.start_next_cycle()
        self._held = 0
        return not unasked

    def close(self) -> None:
        """End it at once; what is unsent is lost."""
        if self._transport is not None:
            self._transport.abort()


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
                head = await connection.head()
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
