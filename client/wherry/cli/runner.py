"""Runs command lines for those who have none of the code loaded (wherry.cli.warm): one forked process each.

Only for this user, in the same namespaces and under the same root, with the same installation; anybody else runs the
command himself. It does not read, it forks: nobody can keep it from the next one. Decisions 0016 and 0033.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import importlib
import os
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import wherry

from . import VERBS, load
from .spares import Spares
from .warm import ENDING, FDS, REQUEST_MAX, SOCKET, stamp

_READ_SECONDS = 5
_NAMESPACES = ("mnt", "pid", "net", "user", "ipc", "uts")
# What verbs load when they are run, beside what `wherry` itself names.
_MODULES = ("wherry.cli.app", "wherry.flags", "wherry.nearby", "wherry.seccomp", "wherry.spec", "uvloop")


def serve(state: Path) -> None:
    """Serve for ever. The code is loaded with the first command: a node that is driven from afar does without."""
    ours = stamp()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    os.chdir(state)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(SOCKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(SOCKET)
        os.chmod(SOCKET, 0o600)
        listener.listen(64)
        spares = Spares(state, listener, lambda connection: _answer(connection, ours))
        loaded = False
        while True:
            spares.prepare()
            connection, _ = listener.accept()
            with connection:
                if not _one_of_us(connection):
                    continue
                if not loaded:
                    _load()
                    loaded = True
                spares.give(connection)


def _load() -> None:
    for module in _MODULES:
        importlib.import_module(module)
    for verb in VERBS:
        load(verb)
    for name in wherry.__all__:
        getattr(wherry, name)
    from .app import build_all

    build_all()
    gc.collect()
    gc.freeze()


def _one_of_us(connection: socket.socket) -> bool:
    """Whether the caller could have done the same by itself: paths and addresses mean the same to it."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.geteuid():
        return False
    try:
        same = os.path.samestat(os.stat(f"/proc/{pid}/root"), os.stat("/"))
        return same and all(
            os.readlink(f"/proc/{pid}/ns/{ns}") == os.readlink(f"/proc/self/ns/{ns}") for ns in _NAMESPACES
        )
    except OSError:
        return False


def _answer(connection: socket.socket, ours: str) -> NoReturn:
    """In the forked process: be the command. Never returns."""
    code = 1
    try:
        words, fds = _receive(connection)
        if words[0] != ours:
            os._exit(0)
        _become(connection, words, fds)
        code = _run(words[3 : 3 + int(words[2])])
        connection.sendall(b"%d\n" % code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code & 0xFF)


def _receive(connection: socket.socket) -> tuple[list[str], list[int]]:
    connection.settimeout(_READ_SECONDS)
    data, fds, _, _ = socket.recv_fds(connection, REQUEST_MAX, FDS)
    body = bytearray(data)
    while len(body) < 4 or len(body) < 4 + int.from_bytes(body[:4], "big"):
        more = connection.recv(REQUEST_MAX)
        if not more or len(body) > REQUEST_MAX:
            raise EOFError("the caller has gone")
        body += more
    if len(fds) != FDS:
        raise EOFError("the caller sent no descriptors")
    connection.settimeout(None)
    return [os.fsdecode(word) for word in bytes(body[4:]).split(b"\0")[:-1]], fds


def _become(connection: socket.socket, words: list[str], fds: list[int]) -> None:
    """Take the caller's place: its descriptors, directory, environment; its signals come by the pidfd we send."""
    os.setsid()
    for number, fd in enumerate(fds[:3]):
        os.dup2(fd, number)
    os.fchdir(fds[3])
    for fd in fds:
        os.close(fd)
    os.umask(int(words[1]))
    os.environ.clear()
    os.environ.update(word.partition("=")[::2] for word in words[3 + int(words[2]) :])
    sys.argv = ["wherry", *words[3 : 3 + int(words[2])]]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as the interpreter opens them at its start
    sys.stdout = open(1, "w", closefd=False, buffering=1 if os.isatty(1) else -1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
    # As a program finds them, also where the node ignores some: nohup. What the caller ignores it does not pass on.
    for number in (signal.SIGCHLD, *set(ENDING) - {signal.SIGINT}):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Once the caller is gone, however that came, so are we: the kernel tells us of its hanging up by this signal.
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | os.O_ASYNC)
    pidfd = os.pidfd_open(os.getpid())
    connection.sendmsg([b"runs\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))])
    os.close(pidfd)


def _run(arguments: list[str]) -> int:
    """The exit code, as the interpreter would find it."""
    from .app import run

    code: object = 0
    try:
        run(arguments)
    except SystemExit as e:
        code = e.code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    try:
        sys.stdout.flush()
    except OSError:
        code = code or 120
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    return int(code or 0)
