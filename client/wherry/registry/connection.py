"""One HTTP/1.1 connection: a request out, its answer in, each at the pace of who sends or reads it.

h11 knows the protocol; here its bytes are moved. Errors say what happened and hold nothing that was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass
from typing import Any, cast

import h11

HEAD_MAX = 64 << 10
"""Longest head of an answer, in bytes."""
READ_BUFFER = 1 << 20
"""Bytes that a connection may hold before it stops reading."""


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
class Body:
    """What is sent: exactly `size` bytes, made afresh for each attempt."""

    size: int
    chunks: Callable[[], AsyncIterable[bytes]]


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
