"""A process forked ahead of the next command line, that has been through one: decision 0033.

A forked process gets a copy of every page that it writes to, and counting references writes: that is half of what a
short command takes. A spare has its copies before it is needed.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

QUIET_SECONDS = 0.2  # after a command came, before anything is done for the next one: this one has the processors
KEPT_SECONDS = 30.0  # a spare is some ten megabytes
ROUNDS = 12  # after so many the interpreter has specialized what it ran
ROUNDS_OF_A_SPARE = 2
_READY = b"r"


class Spares:
    """Forks who answers connections; one of them ahead, while commands keep coming."""

    def __init__(self, state: Path, listener: socket.socket, answer: Callable[[socket.socket], NoReturn]) -> None:
        """answer: what a forked process does with a connection."""
        self._state = state
        self._listener = listener
        self._answer = answer
        self._spare: socket.socket | None = None
        self._rounds = 0
        self._in_use = False

    def prepare(self) -> None:
        """Get ready for the next connection. Returns as soon as there is one, and when nothing is to be done."""
        if not self._in_use or (self._spare is None and not self._is_ready_to_fork()):
            return
        if self._spare is None:
            self._spare = self._fork_ahead()
        if not self._is_called(KEPT_SECONDS):
            self._spare.close()
            self._spare, self._in_use = None, False

    def give(self, connection: socket.socket) -> None:
        """Have a process of its own answer a connection."""
        spare, self._spare, self._in_use = self._spare, None, True
        if spare is not None:
            with spare:
                if _takes(spare, connection):
                    return
        if os.fork() == 0:
            self._listener.close()
            self._answer(connection)

    def _is_ready_to_fork(self) -> bool:
        """Go through what all that are forked profit from; False where somebody comes meanwhile."""
        from .rehearsal import play

        called = self._is_called(QUIET_SECONDS)
        while not called and self._rounds < ROUNDS:
            self._rounds = self._rounds + 1 if play(self._state) else ROUNDS
            called = self._is_called(0)
        return not called

    def _fork_ahead(self) -> socket.socket:
        """The way to a spare; closed, the spare ends."""
        ours, own = socket.socketpair()
        with own:
            if os.fork():
                return ours
            ours.close()
            self._listener.close()  # whoever connected after the node's end would wait for nobody
            self._be_spare(own)

    def _be_spare(self, way: socket.socket) -> NoReturn:
        try:
            from .rehearsal import play

            if all(play(self._state) for _ in range(ROUNDS_OF_A_SPARE)):
                way.send(_READY)
            _, fds, _, _ = socket.recv_fds(way, 1, 1)
            if fds:
                way.close()
                self._answer(socket.socket(fileno=fds[0]))
        finally:
            os._exit(0)

    def _is_called(self, within: float) -> bool:
        return bool(select.select([self._listener], [], [], within)[0])


def _takes(spare: socket.socket, connection: socket.socket) -> bool:
    """Whether it got the connection; not one that is not ready, or that was killed."""
    try:
        if spare.recv(1, socket.MSG_DONTWAIT) == _READY:
            socket.send_fds(spare, [_READY], [connection.fileno()])
            return True
    except OSError:
        pass
    return False
