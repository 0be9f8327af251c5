"""One end of the direct path: a unix stream socket that carries NATS's frames between two processes of a node.

The socket is used without a transport between: messages leave every few, while the next ones are still being made, so
that both processes are busy at once. A transport would hold them until the end of the loop's iteration.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from itertools import islice
from typing import Final

from ..errors import InvalidArgument, ResourceExhausted, Unavailable
from .protocol import Receiver

log = logging.getLogger(__name__)

MAX_PAYLOAD: Final = 1 << 20  # bytes of one message, its headers included: nats-server's default
HIGH_WATER: Final = 4 << 20  # bytes unsent at which there is pressure, until all of them are sent
UNSENT_MAX: Final = 64 << 20  # bytes unsent at which a message is refused
BATCH: Final = 4  # messages that are sent together while more are being made
MUTATIONS: Final = 8  # the same of mutations: they wait for a disk, and what came together shares one write
LARGE: Final = 64 << 10  # a write of more bytes is handed over piece by piece instead of being copied together
_PIECES_MAX: Final = 64  # of one sendmsg
_CRLF: Final = b"\r\n"
LEAVING: Final = b'INFO {"ldm":true}\r\n'  # the last line: what is not answered now was not begun


class Pipe:
    """Reads and writes frames until it ends. A subclass takes the messages (it is the parser's protocol.Sink)."""

    def __init__(self, sock: socket.socket) -> None:
        """sock: connected and non-blocking; it is this object's from here on."""
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._receiver = Receiver(self, limit=MAX_PAYLOAD)
        self._pieces: list[bytes] = []
        self._messages = self._size = 0
        self._planned = False  # a flush is due at the end of what the loop does now
        self._unsent: deque[memoryview] = deque()
        self._unsent_size = 0
        self._sent: asyncio.Future[None] | None = None
        self._pressed = False
        self._reading = True
        self.ended = False
        self._loop.add_reader(sock, self._readable)

    # ---- writing

    def send(
        self, subject: str, reply: str, block: bytes, data: bytes, *, alone: bool = False, batch: int = BATCH
    ) -> None:
        """Write one message; block: its encoded headers, or b""; alone: it leaves now, no other is expected.

        batch: it leaves at the latest with so many.

        Unavailable when the pipe has ended, InvalidArgument when the message is too large, ResourceExhausted when the
        other end has not read for too long.
        """
        if self.ended:
            raise Unavailable("the direct connection has ended")
        if self._unsent_size > UNSENT_MAX:
            raise ResourceExhausted(f"over {UNSENT_MAX} bytes wait on the direct path")
        names = f"{subject} 1 {reply}" if reply else f"{subject} 1"
        size = len(data)
        if block:
            size += len(block)
            line = f"HMSG {names} {len(block)} {size}\r\n".encode("utf-8", "surrogateescape") + block
        else:
            line = f"MSG {names} {size}\r\n".encode("utf-8", "surrogateescape")
        if size > MAX_PAYLOAD:
            raise InvalidArgument(f"{size} bytes for {subject} exceed the limit of {MAX_PAYLOAD}")
        self._pieces += (line, data, _CRLF)
        self._size += len(line) + len(data) + 2
        self._messages += 1
        if alone or self._messages >= batch:
            self.flush()
        elif not self._planned:
            self._planned = True
            self._loop.call_soon(self._flush_planned)

    def say(self, line: bytes) -> None:
        """Write one operation that is no message."""
        self._pieces.append(line)
        self._size += len(line)
        self._messages += 1
        self.flush()

    def flush(self) -> None:
        """Hand over what was written; what the socket does not take now leaves when it does."""
        if not self._messages:
            return
        pieces, size = self._pieces, self._size
        self._pieces, self._messages, self._size = [], 0, 0
        if self.ended:
            return
        if self._unsent or size > LARGE:
            self._keep(pieces)
        else:
            data = b"".join(pieces)
            sent = self._try(data)
            if sent < len(data):
                self._keep([memoryview(data)[sent:]])

    def _flush_planned(self) -> None:
        self._planned = False
        self.flush()

    def _try(self, data: bytes) -> int:
        """How many of the bytes the socket takes now; all of them when the other end is closed: nobody wants them."""
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._unsendable(error)
            return len(data)

    def _unsendable(self, error: OSError) -> None:
        """The other end is closed: what it said before that is still to be read, and then its end."""
        if not self._reading:
            self.end(error)
            return
        if self._unsent:
            self._loop.remove_writer(self._socket)
            self._unsent.clear()
            self._unsent_size = 0
        self._tell_sent()

    def _keep(self, pieces: list[bytes] | list[memoryview]) -> None:
        """Send these after what is unsent already, as the socket takes them."""
        if not self._unsent:
            self._loop.add_writer(self._socket, self._writable)
        for piece in pieces:
            self._unsent.append(memoryview(piece))
            self._unsent_size += len(piece)
        if self._unsent_size > HIGH_WATER and not self._pressed:
            self._pressed = True
            self.on_pressure(True)

    def _writable(self) -> None:
        unsent = self._unsent
        try:
            sent = self._socket.sendmsg(list(islice(unsent, _PIECES_MAX)))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._unsendable(error)
            return
        self._unsent_size -= sent
        while unsent and sent >= len(unsent[0]):
            sent -= len(unsent.popleft())
        if sent:
            unsent[0] = unsent[0][sent:]
        if not unsent:
            self._loop.remove_writer(self._socket)
            self._tell_sent()
            if self._pressed:
                self._pressed = False
                self.on_pressure(False)

    async def sent(self) -> None:
        """Return when all that was written has left, or nothing can leave any more. For one waiter."""
        self.flush()
        if self._unsent:
            self._sent = self._loop.create_future()
            await self._sent

    def _tell_sent(self) -> None:
        if self._sent is not None and not self._sent.done():
            self._sent.set_result(None)

    # ---- reading

    def _readable(self) -> None:
        try:
            got = self._socket.recv_into(self._receiver.get_buffer(-1))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.end(error)
            return
        if not got:
            self.end(None)
            return
        planned, self._planned = self._planned, True  # what is answered at once leaves at the end of this
        self._receiver.buffer_updated(got)
        self._planned = planned
        self.flush()

    def pause(self) -> None:
        """Read no more for now: the other end has to wait."""
        self._reading = False
        if not self.ended:
            self._loop.remove_reader(self._socket)

    def resume(self) -> None:
        """Read again."""
        self._reading = True
        if not self.ended:
            self._loop.add_reader(self._socket, self._readable)

    # ---- protocol.Sink

    def on_message(self, sid: str, subject: str, reply: str, block: bytes | None, data: bytes) -> None:
        raise NotImplementedError

    def on_ping(self) -> None:
        """Nobody pings here: the kernel tells when the other end is gone."""

    def on_pong(self) -> None:
        """See on_ping."""

    def on_info(self, info: bytes) -> None:
        """The other end is LEAVING: there is nothing else to be told of."""

    def on_error(self, text: str) -> None:
        log.warning("on the direct path: %s", text[:200])

    def on_broken(self, reason: str) -> None:
        log.warning("a direct connection is given up: %s", reason)
        self.end(ConnectionAbortedError(reason))

    def on_lost(self, error: Exception | None) -> None:
        """The pipe has ended."""

    def on_pressure(self, paused: bool) -> None:
        """More than HIGH_WATER bytes are unsent; or none is any more."""

    # ---- the end

    def end(self, error: Exception | None = None) -> None:
        """Close it, with all that is unsent. It may be repeated."""
        if self.ended:
            return
        self.ended = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._pieces, self._messages, self._size = [], 0, 0
        self._unsent.clear()
        self._unsent_size = 0
        self._tell_sent()
        self.on_lost(error)
