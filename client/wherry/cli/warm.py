"""Hands a command line over to the node's process that has the code loaded already (runner.py).

Starting Python and loading what a verb needs takes three times as long as running a container. This side imports
nothing but what the interpreter has at its start. Decision 0016.
"""

from __future__ import annotations

import _socket
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from types import FrameType
else:
    import _signal

SOCKET = "cli.sock"
# `up` is the node itself, and the others are done before they could be handed over.
_COLD = ("up", "version", "auth")
_ASKING = ("attach", "prune", "start")
ENDING = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGUSR1, _signal.SIGUSR2)
_HELD_BACK = (*ENDING, _signal.SIGWINCH, _signal.SIGTSTP)
# Beyond it a command line is not worth the trouble.
REQUEST_MAX = 1 << 20
PATIENCE = 20.0
FDS = 4  # stdin, stdout, stderr, the working directory


def hand_over(arguments: list[str]) -> int | None:
    """The command's exit code; None when no node of this installation is there to run it: run it here."""
    if not _may(arguments) or os.environ.get("WHERRY_WARM") == "0":
        return None
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    # Until somebody can be told of them: one that came now would end or stop us alone.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _HELD_BACK)
    try:
        _connect(sock, os.environ.get("WHERRY_STATE", "/run/wherry"))
        _send(sock, request(arguments))
        sock.settimeout(PATIENCE)  # its end then ends who might run it late
        said, ancillary, _, _ = sock.recvmsg(64, _socket.CMSG_LEN(4))
        sock.settimeout(None)
    except OSError:
        said, ancillary = b"", []
    stand = _Stand(sock, int.from_bytes(ancillary[0][2], sys.byteorder)) if said == b"runs\n" and ancillary else None
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, _HELD_BACK)
    return None if stand is None else stand.see_through()


def _connect(sock: _socket.socket, state: str) -> None:
    """By the directory: a long path would not fit into an address."""
    fd = os.open(state, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{fd}/{SOCKET}")
    finally:
        os.close(fd)


def stamp() -> str:
    """Of the code that is installed: another one would not do the same."""
    package = os.path.dirname(os.path.dirname(__file__))
    return f"{package} {os.stat(package).st_mtime_ns} {sys.executable}"


def request(arguments: list[str]) -> bytes:
    """Length, and then, each ended by a NUL: stamp, umask, count of arguments, arguments, environment."""
    mask = os.umask(0o077)
    os.umask(mask)
    words = [stamp(), str(mask), str(len(arguments)), *arguments, *(f"{k}={v}" for k, v in os.environ.items())]
    body = b"".join(os.fsencode(word) + b"\0" for word in words)
    return len(body).to_bytes(4, "big") + body


def _may(arguments: list[str]) -> bool:
    """Whether the command need not be this process."""
    if not arguments or arguments[0] in _COLD or arguments[0][:1] == "-":  # shell completion looks at its parent
        return False
    # A process that reads the terminal belongs into its session, or job control could not hold it back.
    return not (os.isatty(0) and (arguments[0] in _ASKING or any(_interactive(word) for word in arguments)))


def _interactive(word: str) -> bool:
    return word == "--interactive" or (word[:1] == "-" != word[1:2] and "i" in word)


def _send(sock: _socket.socket, data: bytes) -> None:
    if len(data) > REQUEST_MAX:
        raise OSError("too long")
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fds = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (0, 1, 2, here))
        sent = sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])
    finally:
        os.close(here)
    # Once it has all, it may be done before we look again: writing nothing, too, would fail then, and it ran twice.
    if sent < len(data):
        sock.sendall(data[sent:])


class _Stand:
    """Stands for the command in the caller's session: passes signals on, and ends as the command ended."""

    def __init__(self, sock: _socket.socket, pidfd: int) -> None:
        self._sock = sock
        self._pidfd = pidfd
        self._last = int(_signal.SIGKILL)
        for number in (*ENDING, _signal.SIGWINCH):
            if _signal.getsignal(number) != _signal.SIG_IGN:  # nohup
                _signal.signal(number, self._pass_on)
        _signal.signal(_signal.SIGTSTP, self._pause)

    def see_through(self) -> int:
        """Its exit code."""
        said = b""
        while not said.endswith(b"\n"):
            more = self._sock.recv(16)
            if not more:
                return self._die()
            said += more
        return int(said)

    def _die(self) -> int:
        """It was killed: so are we, by what we passed on or by what cannot be."""
        if self._last != _signal.SIGKILL:
            _signal.signal(self._last, _signal.SIG_DFL)
        os.kill(os.getpid(), self._last)
        return 128 + self._last

    def _tell(self, number: int) -> None:
        try:
            _signal.pidfd_send_signal(self._pidfd, number)
        except OSError:
            return  # it has ended

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        if number in ENDING:
            self._last = number
        self._tell(number)

    def _pause(self, number: int, _: FrameType | None) -> None:
        self._tell(_signal.SIGSTOP)
        os.kill(os.getpid(), _signal.SIGSTOP)
        self._tell(_signal.SIGCONT)
