"""One HTTP/1.1 connection: a request out, its answer in, each at the pace of who sends or reads it.

h11 knows the protocol; here its bytes are moved. Of a long body whose length is known only the beginning goes through
h11: the rest is received where its reader wants it. Errors say what happened and hold nothing that was sent.
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
LINGER = 0.05
"""Seconds that the first bytes wait for more to fill their reader's memory."""
UNKNOWN = -1
_SCRATCH = 64 << 10
_NONE = memoryview(b"")


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


class Connection(asyncio.BufferedProtocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self._begin()
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._paused = False
        self._ended = False
        self._answered = False
        self.idle_since = 0.0
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._lingering: asyncio.TimerHandle | None = None

    def _begin(self) -> None:
        """A new exchange."""
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_MAX)
        self._held = 0
        self._left = UNKNOWN  # how many bytes of the body are still to be read, where its length is known
        self._direct = False  # they come past h11 from now on
        self._rest = bytearray()  # what came of them before there was room
        self._room = _NONE
        self._filled = 0

    # ---- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room[self._filled :] if self._room else self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._ended:
            return
        self._answered = True
        if self._room:
            self._fill(nbytes)
            return
        data = self._scratch[:nbytes]
        if self._direct:
            self._rest += data
        else:
            self._http.receive_data(cast(bytes, data))  # which are copied
            self._held += nbytes
        if self._held + len(self._rest) > READ_BUFFER:
            self._pause()
        self._wake()

    def _fill(self, count: int) -> None:
        """So many bytes have come into the room."""
        if not self._filled and self._lingering is None:
            self._lingering = asyncio.get_running_loop().call_later(LINGER, self._filled_enough)
        self._filled += count
        if self._filled >= min(len(self._room), self._left):
            self._filled_enough()

    def _filled_enough(self) -> None:
        self._pause()  # or what comes next would find no room
        self._wake()

    def _pause(self) -> None:
        if not (self._paused or self._ended) and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

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
        if clean and not self._direct:
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

    async def head(self, with_body: bool) -> h11.Response:
        """The head of the answer; interim ones are passed over. with_body: what it says of a body is meant."""
        while True:
            event = await self.event(None)
            if isinstance(event, h11.Response):
                self._left = _length(event) if with_body else UNKNOWN
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise ProtocolError("the answer has no head")

    async def event(self, idle: float | None) -> Any:
        """The next part of the answer."""
        while (event := self._next()) is h11.NEED_DATA:
            await self._more(idle)
        return event

    def _next(self) -> Any:
        """The same, NEED_DATA where it has not come yet."""
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as e:
            raise (Dropped if self._ended else ProtocolError)(str(e)[:200]) from None
        if isinstance(event, h11.Data):
            self._held = max(0, self._held - len(event.data))
            if self._left != UNKNOWN:
                self._left -= len(event.data)
        elif event is h11.NEED_DATA:
            self._held = 0
            if self._ended:
                raise Dropped("the connection ended")
        return event

    async def read_into(self, view: memoryview, idle: float) -> int:
        """Bytes of the body into `view`: all that fit, or that have come when the first have waited LINGER; 0 at its
        end."""
        while not (self._direct or self._rest):
            event = self._next()
            if isinstance(event, h11.Data):
                self._rest += event.data
            elif event is not h11.NEED_DATA:
                return 0
            elif self._left != UNKNOWN:
                self._direct = True
            else:
                await self._more(idle)
        if self._rest:
            return self._take_rest(view)
        return await self._receive(view, idle) if self._left else 0

    def _take_rest(self, view: memoryview) -> int:
        count = min(len(view), len(self._rest))
        if self._direct:
            count = min(count, self._left)
            self._left -= count
        view[:count] = self._rest[:count]
        del self._rest[:count]
        return count

    async def _receive(self, view: memoryview, idle: float) -> int:
        """Let the transport write into `view`."""
        # Never exactly what is left: bytes that nobody asked for then come along, and cost the connection.
        self._room, self._filled = view[: -1 if len(view) == self._left > 1 else None], 0
        try:
            if not self._ended:
                await self._more(idle)
        finally:
            self._pause()
            self._room = _NONE
            if self._lingering is not None:
                self._lingering.cancel()
                self._lingering = None
        if not self._filled:
            raise Dropped("the connection ended")
        count = min(self._filled, self._left)
        self._rest += view[count : self._filled]
        self._left -= count
        return count

    async def _more(self, idle: float | None) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        self._resume()
        try:
            async with asyncio.timeout(idle):
                await self._waiter
        finally:
            self._waiter = None

    def renew(self) -> bool:
        """Make ready for the next exchange; False when the connection cannot have one."""
        theirs = not self._left and not self._rest if self._direct else self._http.their_state is h11.DONE
        if self._http.our_state is not h11.DONE or not theirs or self._ended:
            return False
        unasked = not self._direct and bool(self._http.trailing_data[0])
        self._begin()
        self._resume()
        return not unasked

    def _resume(self) -> None:
        if self._paused and not self._ended and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def close(self) -> None:
        """End it at once; what is unsent is lost."""
        if self._transport is not None:
            self._transport.abort()


def _length(head: h11.Response) -> int:
    """The length of a body that comes as it is; UNKNOWN where h11 has to find its end."""
    fields = dict(head.headers)
    value = fields.get(b"content-length", b"")
    plain = head.status_code in (200, 206) and b"transfer-encoding" not in fields
    return int(value) if plain and value.isdigit() and len(value) < 20 else UNKNOWN
