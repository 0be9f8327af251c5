"""Where the direct path's sockets lie: `<state>/<owner>/direct/<node>.<service>/<instance>.sock`, as in the subjects.

`<state>/<owner>` is the folder of the process that serves, and its user's alone: no service can put itself in another's
place. Whoever cannot make or open the sockets goes by the bus.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

SUFFIX: Final = ".sock"
FOLDER: Final = "direct"
_PATH_MAX: Final = 107  # bytes of a sockaddr_un, without its end


def folder(state: Path, owner: str, node: str, service: str) -> Path:
    """The folder of a contract's sockets. owner: Contract.owner; node, service: as in the subject."""
    return state / owner / FOLDER / f"{node}.{service}"


def make_folder(path: Path) -> None:
    """Make it, for this process's user alone. OSError where it may not, or where another user has been."""
    for made in (path.parents[1], path.parent, path):
        with suppress(FileExistsError):
            made.mkdir(mode=0o700)
        found = made.stat(follow_symlinks=False)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022 or not stat.S_ISDIR(found.st_mode):
            raise PermissionError(f"{made} is not this process's own")


def check_folder(path: Path) -> None:
    """PermissionError when others than the node and the service could put something there. OSError: it is not there."""
    own, state = path.parents[1], path.parents[2]
    root, found = state.stat(), own.stat(follow_symlinks=False)
    if root.st_uid not in (0, os.geteuid()) or (root.st_mode | found.st_mode) & 0o022:
        raise PermissionError(f"{own} is open to others than the node")


def instances(path: Path) -> list[str]:
    """The instances that have a socket there."""
    return [name.removesuffix(SUFFIX) for name in os.listdir(path) if name.endswith(SUFFIX)]


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """A name of `path` that fits into an address: as it is, or by way of its open folder."""
    if len(os.fsencode(path)) <= _PATH_MAX:
        yield str(path)
        return
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def connect(path: Path) -> socket.socket:
    """A connection to a socket: there at once or not at all. OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with _address(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(path: Path, backlog: int) -> socket.socket:
    """A listening socket at `path`, in place of what is left of an earlier one. OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    temporary = path.with_name(f".{path.stem}")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        os.fchmod(listener.fileno(), 0o600)  # before it has a name that could be put under something else
        with _address(temporary) as name:
            listener.bind(name)
        listener.listen(backlog)
        temporary.replace(path)  # what can be seen there can be connected to
    except BaseException:
        listener.close()
        raise
    return listener


def sweep(path: Path) -> None:
    """Remove the sockets there that nobody listens on: their processes were killed."""
    for instance in instances(path):
        left = path / f"{instance}{SUFFIX}"
        try:
            connect(left).close()
        except ConnectionRefusedError:
            with suppress(OSError):
                left.unlink()
        except OSError:
            continue
