"""The socket over which an OCI runtime sends the master of a new terminal."""

from __future__ import annotations

import _socket
import os

from wherry_task.monitor import libc, wire

_MSG_CMSG_CLOEXEC = 0x40000000


class ConsoleSocket:
    """A listening socket in the working directory, named for one create or exec; remove it with `close`."""

    def __init__(self, name: str) -> None:
        # Relative on purpose: the bundle's path may be longer than a sockaddr, and the runtime runs in the bundle.
        self.name = name
        if os.path.exists(name):
            os.unlink(name)
        self._listener = wire.listen(name)

    def master(self) -> int:
        """The descriptor that the runtime, which has ended by now, left in the socket. Raises Failure when none."""
        try:
            connection = _socket.socket(fileno=libc.accept(self._listener))
        except OSError as error:
            raise wire.failure_of(error, "the runtime did not connect to the console socket") from None
        connection.settimeout(5)
        try:
            _, ancillary, _, _ = connection.recvmsg(256, _socket.CMSG_SPACE(4), _MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise wire.failure_of(error, "receive the terminal") from None
        finally:
            connection.close()
        for level, kind, data in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS and len(data) >= 4:
                return int.from_bytes(data[:4], "little")
        raise wire.Failure(wire.UNKNOWN, "the runtime sent no terminal over the console socket")

    def close(self) -> None:
        os.close(self._listener)
        os.unlink(self.name)
