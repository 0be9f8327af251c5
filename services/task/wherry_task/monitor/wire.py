"""Frames on a unix stream socket: a 4-byte big-endian length, then one JSON object. README.md has the messages."""

from __future__ import annotations

import _socket
import errno
import os
import select

from wherry_task.monitor import compact

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from wherry_task.monitor.loop import Loop

# The codes are those of wherry_shared.errors (gRPC's), which this package may not import.
UNKNOWN, INVALID, NOT_FOUND, EXISTS, DENIED, EXHAUSTED, PRECONDITION = 2, 3, 5, 6, 7, 8, 9
UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 12, 13, 14

MAX_FRAME = 1 << 20  # a create with 500 layers is about 64 KiB; process specs travel as files
MAX_UNSENT = 4 << 20  # a client this far behind is dropped: it can connect again and ask from where it was
_CHUNK = 1 << 16
_BY_ERRNO = {errno.ENOENT: NOT_FOUND, errno.EEXIST: EXISTS, errno.EPERM: DENIED, errno.EACCES: DENIED,
             errno.ENOSPC: EXHAUSTED, errno.EMFILE: EXHAUSTED, errno.EDQUOT: EXHAUSTED, errno.ELOOP: DENIED}  # fmt: skip


class Failure(Exception):
    """An operation that is refused or failed: a code of wherry_shared.errors and a message for a person."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def failure_of(error: OSError, what: str) -> Failure:
    """The Failure that stands for a failed system call."""
    reason = error.strerror or str(error)
    return Failure(_BY_ERRNO.get(error.errno or 0, UNKNOWN), f"{what}: {reason}")


def encode(message: dict[str, Any]) -> bytes:
    """One frame. Raises ValueError above MAX_FRAME bytes."""
    body = compact.dumps(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"frame of {len(body)} bytes")
    return len(body).to_bytes(4, "big") + body


def take(buffer: bytearray) -> dict[str, Any] | None:
    """Remove the first whole frame from the buffer; None when there is none yet. ValueError when it is not a frame."""
    if len(buffer) < 4:
        return None
    size = int.from_bytes(buffer[:4], "big")
    if size > MAX_FRAME:
        raise ValueError(f"frame of {size} bytes")
    if len(buffer) < 4 + size:
        return None
    message = compact.loads(buffer[4 : 4 + size])
    del buffer[: 4 + size]
    if not isinstance(message, dict):
        raise ValueError("a frame must hold an object")
    return message


def listen(name: str) -> int:
    """A listening socket with this name in the working directory (a long path would not fit into a sockaddr)."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    try:
        sock.bind(name)
        sock.listen(64)
        os.chmod(name, 0o600)
    except OSError:
        sock.close()
        raise
    return sock.detach()


def accept(listener: int) -> int:
    """A connection, blocking. Raises BlockingIOError when none waits, PermissionError when a stranger connected."""
    sock = _socket.socket(fileno=listener)
    try:
        fd, _ = sock._accept()
    finally:
        sock.detach()
    peer = _socket.socket(fileno=fd)
    credentials = peer.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    peer.detach()
    # The 0700 directory already keeps strangers out; this holds even where someone widened it.
    if int.from_bytes(credentials[4:8], "little") not in (0, os.geteuid()):
        os.close(fd)
        raise PermissionError(errno.EPERM, "peer is another user")
    return fd


class Channel:
    """One connected client in the loop: whole frames in, frames out, and neither side can block the process."""

    __slots__ = ("_gone", "_inbox", "_loop", "_message", "_outbox", "fd", "watching")

    def __init__(
        self,
        loop: Loop,
        fd: int,
        message: Callable[[Channel, dict[str, Any]], None],
        gone: Callable[[Channel], None],
        inbox: bytes | bytearray = b"",
    ) -> None:
        self.fd = fd
        self.watching = False
        self._loop = loop
        self._message = message
        self._gone = gone
        self._inbox = bytearray(inbox)
        self._outbox = bytearray()
        os.set_blocking(fd, False)
        loop.watch(fd, select.POLLIN, self._ready)
        if inbox:
            loop.after(0, self._deliver)

    def close(self) -> None:
        """Hang up; a second call does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self._loop.unwatch(fd)
            os.close(fd)
            self._gone(self)

    def send(self, message: dict[str, Any]) -> None:
        """Queue one frame; to a client that is gone this does nothing."""
        if self.fd < 0:
            return
        self._outbox += encode(message)
        self.flush()
        if len(self._outbox) > MAX_UNSENT:
            self.close()

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""
        return len(self._outbox) if self.fd >= 0 else 0

    def flush(self) -> None:
        """Hand over what the socket takes now; the rest follows when it is writable."""
        try:
            while self._outbox:
                del self._outbox[: os.write(self.fd, self._outbox)]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        self._loop.watch(self.fd, select.POLLIN | (select.POLLOUT if self._outbox else 0), self._ready)

    def _ready(self, events: int) -> None:
        if events & select.POLLOUT:
            self.flush()
        if self.fd >= 0 and events & ~select.POLLOUT:
            self._receive()

    def _receive(self) -> None:
        try:
            data = os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._inbox += data
        self._deliver()

    def _deliver(self) -> None:
        # A handler may close this channel, so the descriptor is looked at before every frame.
        while self.fd >= 0:
            try:
                message = take(self._inbox)
            except ValueError:
                self.close()
                return
            if message is None:
                return
            self._message(self, message)
