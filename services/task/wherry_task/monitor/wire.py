"""Frames between the task service and a monitor or the zygote; README.md says what each operation carries.

A frame is a 4-byte big-endian length and one JSON object: a request {id, op, ...}, a reply {id, ok} or {id, error}, or
a notice {notice, seq, ...}.
"""

from __future__ import annotations

import _socket
import errno
import os

from wherry_task.monitor import compact

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_FRAME = 1 << 20  # a create with 500 layers takes about 64 KiB; process specs travel as files
MAX_UNSENT = 4 << 20  # a client this far behind is dropped: it can connect again and ask from where it was

# The codes of wherry_shared.errors (gRPC's), which this package may not import.
UNKNOWN, INVALID, NOT_FOUND, EXISTS, DENIED, EXHAUSTED, PRECONDITION = 2, 3, 5, 6, 7, 8, 9
UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 12, 13, 14

_BY_ERRNO = {
    errno.ENOENT: NOT_FOUND, errno.EEXIST: EXISTS, errno.EPERM: DENIED, errno.EACCES: DENIED, errno.ELOOP: DENIED,
    errno.ENOSPC: EXHAUSTED, errno.EMFILE: EXHAUSTED, errno.EDQUOT: EXHAUSTED, errno.EAGAIN: EXHAUSTED,
}  # fmt: skip


class Failure(Exception):
    """An operation that is refused or failed: a code of wherry_shared.errors and a message for a person."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def body(self) -> bytes:
        """As a reply's `error`."""
        return compact.dumps({"code": self.code, "message": self.message})


def failure_of(error: OSError, what: str) -> Failure:
    """The Failure that stands for a failed system call."""
    reason = error.strerror or str(error)
    return Failure(_BY_ERRNO.get(error.errno or 0, UNKNOWN), f"{what}: {reason}")


def frame(body: bytes) -> bytes:
    """One frame around JSON that is ready."""
    return b"%b%b" % (len(body).to_bytes(4, "big"), body)


def reply(request: Any, body: bytes) -> bytes:
    """The frame of a successful reply. Whatever is not a number cannot be an id, and is answered as 0."""
    return frame(b'{"id":%d,"ok":%b}' % (request if isinstance(request, int) else 0, body or b"{}"))


def refusal(request: Any, body: bytes) -> bytes:
    """The frame of a reply that says why not; the body is a Failure's."""
    return frame(b'{"id":%d,"error":%b}' % (request if isinstance(request, int) else 0, body))


def take(inbox: bytearray) -> dict[str, Any] | None:
    """Remove the first whole frame and give its object; None while there is none. ValueError when it is no frame."""
    if len(inbox) < 4:
        return None
    end = 4 + int.from_bytes(inbox[:4], "big")
    if end > 4 + MAX_FRAME:
        raise ValueError("the frame is too long")
    if len(inbox) < end:
        return None
    message = compact.loads(inbox[4:end])
    del inbox[:end]
    if not isinstance(message, dict):
        raise ValueError("the frame holds no object")
    return message


def listen(name: str) -> int:
    """A non-blocking listening socket with this name in the working directory, for our own uid and root alone.

    A name, not a path: a bundle's path may be longer than the 108 bytes of a socket address.
    """
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    try:
        sock.bind(name)
        os.chmod(name, 0o600)  # connecting takes the right to write
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    return sock.detach()
