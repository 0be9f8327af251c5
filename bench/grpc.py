"""The thinnest gRPC client that containerd answers: HTTP/2 frames over its unix socket, one thread, no dependencies.

A Python gRPC library costs a multiple of what the server does for a small request and would be most of what is
measured; this costs about as much as Wherry's own connection does. Header tables are switched off (size 0), windows
are opened once (2 GiB per connection, ours to receive), unary requests must stay below the server's first window (64
KiB in flight) and streamed ones wait for it, and a call that ends without a message has failed: only then are headers
decoded.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from .headers import status

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_WINDOW_MAX = (1 << 31) - 1
_FRAME_MAX, _INITIAL_WINDOW = 16384, 4
_CODES = (
    "OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound", "AlreadyExists",
    "PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted", "OutOfRange", "Unimplemented",
    "Internal", "Unavailable", "DataLoss", "Unauthenticated",
)  # fmt: skip


class GrpcError(Exception):
    """The server refused a call; `code` is gRPC's name for it."""

    def __init__(self, method: str, code: str, message: str) -> None:
        super().__init__(f"{method}: {code}: {message}")
        self.code = code


class Stream:
    """One call on its way: what has arrived of it."""

    __slots__ = ("data", "ended", "headers", "messages", "method", "number", "room")

    def __init__(self, method: str, number: int = 0, room: int = 0) -> None:
        self.method = method
        self.number = number
        self.room = room  # bytes that the server takes before it opens its window again
        self.data = bytearray()
        self.messages: list[bytes] = []
        self.headers: list[bytes] = []
        self.ended = False

    def take(self) -> list[bytes]:
        """The whole messages that arrived since the last time."""
        found, self.messages = self.messages, []
        return found

    def feed(self, chunk: bytes | memoryview) -> None:
        """A DATA frame's payload: messages are framed by a flag and their length, and may span frames."""
        data = self.data
        data += chunk
        at = 0
        while len(data) - at >= 5:
            end = at + 5 + int.from_bytes(data[at + 1 : at + 5], "big")
            if len(data) < end:
                break
            self.messages.append(bytes(data[at + 5 : end]))
            at = end
        del data[:at]

    def error(self) -> GrpcError:
        """Why it ended without a message."""
        number, message = status(self.headers)
        return GrpcError(self.method, _CODES[number] if number < len(_CODES) else str(number), message)


class Connection:
    """One connection, one namespace. Not for several threads; several calls may be under way."""

    def __init__(self, path: str, namespace: str, timeout: float = 120.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        self._socket.connect(path)
        self._namespace = namespace
        self._heads: dict[str, bytes] = {}
        self._buffer = bytearray()
        self._next = 1
        self._room = self._room_of_a_stream = 65535
        self.streams: dict[int, Stream] = {}
        settings = struct.pack(">HIHIHI", 1, 0, 2, 0, 4, _WINDOW_MAX)
        opened = struct.pack(">I", _WINDOW_MAX - 65535)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW, 0, 0, opened))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def _head(self, method: str) -> bytes:
        """The header block of a method: literals only, without Huffman coding, the same for each call."""
        head = b"\x83\x86" + b"\x04" + _literal(f"/{method}") + b"\x01" + _literal("localhost")
        for name, value in (
            ("content-type", "application/grpc"), ("te", "trailers"), ("containerd-namespace", self._namespace),
        ):  # fmt: skip
            head += b"\x00" + _literal(name) + _literal(value)
        return head

    def start(self, method: str, body: bytes) -> Stream:
        """Send a request; `receive` brings its answer."""
        head = self._heads.get(method) or self._heads.setdefault(method, self._head(method))
        number, self._next = self._next, self._next + 2
        stream = self.streams[number] = Stream(method)
        message = b"\0" + len(body).to_bytes(4, "big") + body
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, number, head) + _frame(_DATA, _END_STREAM, number, message))
        return stream

    def open(self, method: str) -> Stream:
        """Begin a call whose request is a stream of messages: `send` them, then `finish`."""
        number, self._next = self._next, self._next + 2
        stream = self.streams[number] = Stream(method, number, self._room_of_a_stream)
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, number, self._head(method)))
        return stream

    def send(self, stream: Stream, body: bytes) -> None:
        """One message, as fast as the server takes it; what it answers meanwhile is taken in."""
        message = memoryview(b"\0" + len(body).to_bytes(4, "big") + body)
        while message and not stream.ended:
            room = min(self._room, stream.room, len(message))
            if not room:
                self.receive()
                continue
            parts: list[bytes | memoryview] = []
            for at in range(0, room, _FRAME_MAX):
                part = message[at : min(at + _FRAME_MAX, room)]
                parts += [len(part).to_bytes(3, "big") + bytes((_DATA, 0)) + stream.number.to_bytes(4, "big"), part]
            self._socket.sendall(b"".join(parts))
            self._room -= room
            stream.room -= room
            message = message[room:]

    def call(self, method: str, body: bytes = b"") -> bytes:
        """One unary call."""
        stream = self.start(method, body)
        self.finish(stream)
        if not stream.messages:
            raise stream.error()
        return stream.messages[0]

    def finish(self, stream: Stream) -> None:
        """Receive until the call has ended."""
        while not stream.ended:
            self.receive()

    def answer(self, stream: Stream) -> bytes:
        """The one message of a call that was started earlier."""
        self.finish(stream)
        if not stream.messages:
            raise stream.error()
        return stream.messages[0]

    def read(self, method: str, body: bytes) -> Iterator[bytes]:
        """The messages of a streaming answer, until it ends."""
        stream = self.start(method, body)
        seen = 0
        while True:
            for message in stream.take():
                seen += 1
                yield message
            if stream.ended:
                break
            self.receive()
        if not seen and stream.headers:
            raise stream.error()

    def flood(self, callers: int, requests: Sequence[tuple[str, bytes]], take: Callable[[bytes], object] = len) -> None:
        """All requests, `callers` of them under way at any time; `take` gets each answer."""
        waiting = iter(requests)
        underway = [self.start(*request) for request in _take(waiting, callers)]
        while underway:
            self.receive()
            still: list[Stream] = []
            for stream in underway:
                if not stream.ended:
                    still.append(stream)
                    continue
                if not stream.messages:
                    raise stream.error()
                take(stream.messages[0])
                still += [self.start(*request) for request in _take(waiting, 1)]
            underway = still

    def receive(self) -> None:
        """Wait for bytes and take in every whole frame."""
        chunk = self._socket.recv(1 << 20)
        if not chunk:
            raise ConnectionError("containerd closed the connection")
        buffer = self._buffer
        buffer += chunk
        at, size = 0, len(buffer)
        with memoryview(buffer) as view:
            while size - at >= 9:
                end = at + 9 + (buffer[at] << 16 | buffer[at + 1] << 8 | buffer[at + 2])
                if size < end:
                    break
                number = int.from_bytes(view[at + 5 : at + 9], "big")
                with view[at + 9 : end] as payload:
                    self._take_in(buffer[at + 3], buffer[at + 4], number, payload)
                at = end
        del buffer[:at]

    def _take_in(self, kind: int, flags: int, number: int, payload: memoryview) -> None:
        if kind in (_DATA, _HEADERS):
            stream = self.streams.get(number)
            if stream is None:
                return
            if kind == _DATA:
                stream.feed(payload)
            else:
                stream.headers.append(bytes(payload))
            if flags & _END_STREAM:
                stream.ended = True
                del self.streams[number]
        elif kind == _WINDOW:
            more = int.from_bytes(payload, "big") & _WINDOW_MAX
            if not number:
                self._room += more
            elif number in self.streams:
                self.streams[number].room += more
        elif kind == _SETTINGS and not flags & _ACK:
            self._resize(payload)
            self._socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._socket.sendall(_frame(_PING, _ACK, 0, bytes(payload)))
        elif kind == _RST and number in self.streams:
            self.streams.pop(number).ended = True
        elif kind == _GOAWAY:
            raise ConnectionError(f"containerd sent GOAWAY: {bytes(payload[8:]).decode(errors='replace')}")

    def _resize(self, settings: memoryview) -> None:
        """The server has another idea of a stream's first window, which counts for those that are open, too."""
        for name, value in struct.iter_unpack(">HI", settings):
            if name == _INITIAL_WINDOW:
                for stream in self.streams.values():
                    stream.room += value - self._room_of_a_stream
                self._room_of_a_stream = value


def wait_all(connections: Sequence[Connection], done: Callable[[], bool], timeout: float = 60.0) -> None:
    """Receive on all connections until `done`."""
    poll = select.epoll()
    by_fd = {connection.fileno(): connection for connection in connections}
    try:
        for fd in by_fd:
            poll.register(fd, select.EPOLLIN)
        while not done():
            ready = poll.poll(timeout)
            if not ready:
                raise TimeoutError(f"nothing more came from containerd for {timeout:.0f} s")
            for fd, _ in ready:
                by_fd[fd].receive()
    finally:
        poll.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _literal(value: str) -> bytes:
    raw = value.encode()
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    rest, out = len(raw) - 127, bytearray(b"\x7f")
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes(out) + bytes((rest,)) + raw


def _take(requests: Iterator[tuple[str, bytes]], count: int) -> list[tuple[str, bytes]]:
    return [request for _, request in zip(range(count), requests, strict=False)]
