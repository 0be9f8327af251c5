"""The socket under a Connection: nats-py's client with our parser, our writes and our idea of an outage.

nats-py keeps what it does well: the server pool, the handshake, nkeys, TLS, reconnecting, the table of
subscriptions, JetStream. What is replaced, and why:

* reading: the transport is handed to `protocol.Receiver` as soon as the handshake is done;
* writing: what one loop iteration writes goes to the transport in one piece, and nothing waits in a list of
  commands, so nothing can be sent after an outage;
* errors: only the end of the socket ends a connection (nats-py closes for good on any -ERR), and the socket is
  aborted rather than closed, so that bytes still buffered for a stalled server are never executed late;
* waiting between attempts: 50 ms, doubling to 1 s, with jitter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from nats.aio.client import Client, Srv
from nats.aio.transport import TcpTransport
from nats.errors import ConnectionReconnectingError
from nats.errors import Error as NatsError

from ..errors import FailedPrecondition, ResourceExhausted, Unauthenticated, WherryError
from .protocol import Message, Receiver
from .transport import Callback

log = logging.getLogger(__name__)

HIGH_WATER: Final = 4 << 20  # bytes in the write buffer at which `room` closes
HARD_LIMIT: Final = 64 << 20  # bytes in the write buffer at which a publisher that does not wait is refused
LARGE: Final = 64 << 10  # a write of more bytes is handed over piece by piece instead of being copied together
PENDING_LIMIT: Final = 1 << 20  # bytes after which a write does not wait for the end of the loop iteration
BACKOFF: Final = (0.05, 1.0)  # seconds: first wait and longest
STABLE_SECONDS: Final = 1.0  # a connection that lived shorter does not reset the back-off

_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)(-[0-9A-Za-z.-]+)?(\+.*)?")
_REJECTED = ("authorization violation", "authentication expired", "authentication revoked")


def check_version(version: str) -> None:
    """Raise FailedPrecondition unless `version` is a nats-server 2.12 from 2.12.7 on, or 2.14.0 and later.

    A pre-release counts as older than its release; any 2.13 is refused.
    """
    match = _VERSION.fullmatch(version)
    if match:
        found = (int(match[1]), int(match[2]), int(match[3]), -1 if match[4] else 0)
        if found >= (2, 14, 0, 0) or (2, 12, 7, 0) <= found < (2, 13, 0, -1):
            return
    found_version = version or "of unknown version"
    raise FailedPrecondition(
        f"nats-server {found_version} is too old: needed is 2.12 from 2.12.7 on, or 2.14.0 or later"
    )


def sendable(subject: str) -> bool:
    """Whether it can stand in a protocol line: no blanks, no control characters, not empty."""
    return bool(subject) and subject.isprintable() and " " not in subject


def _abort(stream: asyncio.WriteTransport) -> None:
    with contextlib.suppress(AttributeError):  # CPython's TLS transport, once closed twice, has lost its protocol
        stream.abort()


class Link(Client):
    """One nats-py client whose hot path is ours. It serves `Connection`, and nats-py's JetStream."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, must_encrypt: bool) -> None:
        super().__init__()
        self.out: asyncio.Transport | None = None  # None is an outage: nothing may be written
        self.callbacks: dict[str, Callback] = {}  # by subscription id as on the wire; what is not here is nats-py's
        self.state_changed: Callable[[bool], None] = lambda connected: None
        self.refused: Callable[[str], None] = lambda text: None  # an -ERR line that leaves the connection open
        self.room = asyncio.Event()  # cleared while the write buffer is above its high-water mark
        self.room.set()
        self.established = False  # the first handshake succeeded: from then on every failure is retried
        self._loop = loop
        self._must_encrypt = must_encrypt
        self._pieces: list[bytes] = []
        self._pieces_size = 0
        self._lost: asyncio.Future[Exception | None] = loop.create_future()
        self._failures = 0
        self._attached_at = 0.0
        self._lane: deque[tuple[Callable[..., Awaitable[None]], tuple[Any, ...]]] = deque()
        self._lane_task: asyncio.Task[None] | None = None

    # ---- writing

    def write(self, *pieces: bytes, size: int) -> None:
        """Send `pieces`, `size` bytes in all, with everything else of this loop iteration. Only while `out` is set.

        Raises ResourceExhausted when the caller has filled HARD_LIMIT without waiting for `room`.
        """
        if self._pieces_size == 0:
            self._loop.call_soon(self.send_now)
        self._pieces += pieces
        self._pieces_size += size
        if self._pieces_size > PENDING_LIMIT:
            self.send_now()

    def send_now(self) -> None:
        """Hand what was written to the transport; during an outage, forget it."""
        pieces, size, out = self._pieces, self._pieces_size, self.out
        self._pieces, self._pieces_size = [], 0
        if out is None or not size or out.is_closing():
            return
        if size > LARGE:
            out.writelines(pieces)
        else:
            out.write(b"".join(pieces))

    def check_room(self) -> None:
        """Raise ResourceExhausted when a publisher has ignored back-pressure up to HARD_LIMIT."""
        if not self.room.is_set() and self.out is not None and self.out.get_write_buffer_size() > HARD_LIMIT:
            raise ResourceExhausted(f"over {HARD_LIMIT} bytes wait for nats-server: wait for writable() between sends")

    # ---- protocol.Sink: called by the receiver

    def on_message(self, sid: str, subject: str, reply: str, block: bytes | None, data: bytes) -> None:
        callback = self.callbacks.get(sid)
        if callback is None:
            names = subject.encode("utf-8", "surrogateescape"), reply.encode("utf-8", "surrogateescape")
            self._later(self._process_msg, int(sid), *names, data, block)
            return
        try:
            callback(Message(subject, data, reply, block))
        except Exception:
            log.exception("the callback for a message on %s failed", subject)

    def on_ping(self) -> None:
        if self.out is not None:
            self.write(b"PONG\r\n", size=6)

    def on_pong(self) -> None:
        self._pings_outstanding = 0
        if self._pongs:
            answered = self._pongs.pop(0)
            if not answered.done():
                answered.set_result(True)

    def on_info(self, info: bytes) -> None:
        try:
            changed = json.loads(info)
            self._max_payload = int(changed.get("max_payload", self._max_payload))
        except (ValueError, AttributeError, TypeError):
            log.warning("nats-server sent an INFO that cannot be read: %r", info[:200])
            return
        self._later(self._process_info, changed)

    def on_error(self, text: str) -> None:
        # Errors that end the connection are followed by its end; the others leave it as it is.
        self._err = NatsError(f"nats: {text}")
        self.refused(text)

    def on_broken(self, reason: str) -> None:
        log.error("the connection to nats-server is given up: %s", reason)
        self.abort()

    def on_lost(self, error: Exception | None) -> None:
        if not self._lost.done():
            self._lost.set_result(error)
        self._detach()

    def on_pressure(self, paused: bool) -> None:
        if paused:
            self.room.clear()
        else:
            self.room.set()

    # ---- what does not fit into a synchronous parser: JetStream's messages and changed cluster members

    def _later(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        self._lane.append((function, arguments))
        if self._lane_task is None:
            self._lane_task = self._loop.create_task(self._run_lane())

    async def _run_lane(self) -> None:
        """One after the other, because a message must not overtake the one before it."""
        while self._lane:
            function, arguments = self._lane.popleft()
            try:
                await function(*arguments)
            except Exception:
                log.exception("a message for nats-py could not be processed")
        self._lane_task = None

    # ---- connection and outage

    def abort(self) -> None:
        """Drop the socket with all that it still holds: what has not reached the server never will."""
        out = self.out
        self._detach()
        if out is not None:
            _abort(out)

    def drop(self) -> None:
        """Abort also a socket whose handshake is not done."""
        self.abort()
        if isinstance(self._transport, TcpTransport) and self._transport._io_writer is not None:
            _abort(self._transport._io_writer.transport)

    def _detach(self) -> None:
        if self.out is None:
            return
        self.out, self._pieces, self._pieces_size = None, [], 0
        self.room.set()
        if self._loop.time() - self._attached_at > STABLE_SECONDS:
            self._failures = 0
        for waiting in list(self._resp_map.values()):  # JetStream's requests, which nats-py would let time out
            if not waiting.done():
                waiting.set_exception(ConnectionReconnectingError())
                waiting.exception()  # nats-py leaves some behind that nobody awaits: no complaint about those
        self.state_changed(False)

    def _streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        opened = cast(TcpTransport, self._transport)
        if opened._io_reader is None or opened._io_writer is None:
            raise ConnectionResetError("there is no connection to nats-server")
        return opened._io_reader, opened._io_writer

    def _attach(self) -> None:
        """Take the socket over from nats-py's reader, with the bytes that it has read ahead."""
        reader, writer = self._streams()
        stream = cast(asyncio.Transport, writer.transport)
        if reader.at_eof() or reader.exception() is not None or stream.is_closing():
            raise ConnectionResetError("nats-server closed the connection during the handshake")
        stream.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        receiver = Receiver(self, cast(asyncio.Protocol, stream.get_protocol()))
        stream.pause_reading()  # uvloop chooses between its two ways of reading when it starts to read
        stream.set_protocol(receiver)
        stream.set_write_buffer_limits(high=HIGH_WATER)
        self._lost = self._loop.create_future()
        self._attached_at = self._loop.time()
        self.out = stream
        read_ahead = bytes(reader._buffer)  # type: ignore[attr-defined]
        reader._buffer.clear()  # type: ignore[attr-defined]
        receiver.feed(read_ahead)
        stream.resume_reading()

    # ---- nats-py's methods that are replaced

    async def _process_connect_init(self) -> None:
        self._cancel_tasks()
        try:
            await super()._process_connect_init()
            if not self.is_connected:
                raise NatsError("nats: the server did not answer the handshake's PING")
            self._attach()
        except WherryError:
            raise
        except Exception as error:
            self._cancel_tasks()
            if not self.established and any(word in str(error).lower() for word in _REJECTED):
                raise Unauthenticated(f"nats-server does not accept these credentials: {error}") from error
            if isinstance(error, (OSError, NatsError)):
                raise
            # nats-py retries those two; anything else, from a peer that is no nats-server say, would end its loop
            raise NatsError(f"nats: the handshake failed: {error!r}") from error
        self.established = True

    def _cancel_tasks(self) -> None:
        """nats-py forgets the tasks of a handshake or replay that fails half-way."""
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
            if task is not None:
                task.cancel()

    def _connect_command(self) -> bytes:
        """Called between the server's INFO and our CONNECT: the last moment before credentials leave the process."""
        _, writer = self._streams()
        try:
            check_version(str(self._server_info.get("version", "")))
            if self._signature_cb is not None and "nonce" not in self._server_info:
                raise FailedPrecondition(
                    "nats-server asks nobody for an nkey: whoever reaches its port could act as anybody. Give it the"
                    " generated users (authorization)"
                )
            if self._must_encrypt and writer.get_extra_info("sslcontext") is None:
                raise FailedPrecondition("TLS is asked for, and nats-server does not offer it")
        except WherryError as error:
            if not self.established:
                raise
            raise NatsError(str(error)) from error  # nats-py retries its own class
        return super()._connect_command()

    async def _connect_to_server(self, s: Srv) -> None:
        self.drop()  # what an attempt that failed half-way has left
        if self._failures:
            wait = min(BACKOFF[0] * 2 ** min(self._failures - 1, 10), BACKOFF[1])
            await asyncio.sleep(wait * random.uniform(0.8, 1.2))  # noqa: S311
        self._failures += 1
        await super()._connect_to_server(s)

    async def _read_loop(self) -> None:
        error = await self._lost
        await self._process_op_err(error or ConnectionResetError("nats-server closed the connection"))

    async def _process_op_err(self, e: Exception) -> None:
        self._err = e
        self.abort()
        await super()._process_op_err(e)

    async def _send_command(self, cmd: bytes, priority: bool = False) -> None:
        if self.out is not None:
            self.write(cmd, size=len(cmd))
        elif cmd.startswith((b"PUB", b"HPUB")):
            raise ConnectionReconnectingError
        # The rest is forgotten during an outage: subscriptions are replayed from the table.

    async def _flush_pending(self, force_flush: bool = False) -> None:
        return None

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        self._pongs.append(self._loop.create_future() if future is None else future)
        await self._send_command(b"PING\r\n")
