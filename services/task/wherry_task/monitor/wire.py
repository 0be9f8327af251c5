"""Frames between the task service and a monitor or the zygote; README.md says what each operation carries.

A frame is a 9-byte header - body length u32, request id u32, operation or status u8, big-endian - and the body. The
monitor itself never parses JSON: it looks at the header and at the exec id that begins the body of a request.
"""

from __future__ import annotations

import _socket
import errno
import os

HEADER = 9
MAX_BODY = 1 << 20  # a create with 500 layers takes about 64 KiB; process specs travel as files
MAX_UNSENT = 4 << 20  # a client this far behind is dropped: it can connect again and ask from where it was

# Operations of the zygote.
PING, SPAWN, CLEANUP, QUIT = 1, 2, 3, 4
# Operations of a monitor. Those up to SHUTDOWN it does itself, the others in a forked worker.
WATCH, WAIT, KILL, CLOSE_STDIN, SHUTDOWN = 16, 17, 18, 19, 20
CREATE, START, EXEC, DELETE, STATE, RESIZE = 32, 33, 34, 35, 36, 37
PAUSE, RESUME, UPDATE, CHECKPOINT, KILL_ALL = 38, 39, 40, 41, 42
# Work that the monitor gives its workers of its own accord.
EXITED, OOM = 64, 65
# In the place of a reply's status: a notice, with request id 0.
EXIT_NOTICE, OOM_NOTICE = 240, 241

# A reply's status is OK or a code of wherry_shared.errors (gRPC's), which this package may not import.
OK, UNKNOWN, INVALID, NOT_FOUND, EXISTS, DENIED, EXHAUSTED, PRECONDITION = 0, 2, 3, 5, 6, 7, 8, 9
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


def failure_of(error: OSError, what: str) -> Failure:
    """The Failure that stands for a failed system call."""
    reason = error.strerror or str(error)
    return Failure(_BY_ERRNO.get(error.errno or 0, UNKNOWN), f"{what}: {reason}")


def frame(request: int, code: int, body: bytes = b"") -> bytes:
    """One frame, ready to be sent."""
    return b"%b%b%c%b" % (len(body).to_bytes(4, "big"), request.to_bytes(4, "big"), code, body)


def take(inbox: bytearray) -> tuple[int, int, bytes] | None:
    """Remove the first whole frame: (request id, operation or status, body), or None while there is none.

    Raises ValueError when its body would be longer than MAX_BODY.
    """
    if len(inbox) < HEADER:
        return None
    end = HEADER + int.from_bytes(inbox[:4], "big")
    if end > HEADER + MAX_BODY:
        raise ValueError("the frame is too long")
    if len(inbox) < end:
        return None
    found = int.from_bytes(inbox[4:8], "big"), inbox[8], bytes(inbox[HEADER:end])
    del inbox[:end]
    return found


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
