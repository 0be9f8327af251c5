"""Where the direct path's sockets lie: `<state>/direct/<node>.<service>/<instance>.sock`, tokens as in the subjects.

Each service's folder is its user's alone, so that no service can put itself in another's place; `direct` is the
node's. Whoever cannot make or open them goes by the bus.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from ..errors import PermissionDenied

SUFFIX: Final = ".sock"
FOLDER: Final = "direct"
_PATH_MAX: Final = 107  # bytes of a sockaddr_un, without its end


def folder(state: Path, node: str, service: str) -> Path:
    """The folder of a service's sockets. node, service: as in the subject."""
    return state / FOLDER / f"{node}.{service}"


def make_folder(path: Path) -> None:
    """Make a service's folder, for this process's user alone. OSError where it may not."""
    with suppress(FileExistsError):
        path.parent.mkdir(mode=0o700)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)


def check_folder(path: Path) -> None:
    """PermissionDenied when others than the node could have put something there. OSError when it is not there."""
    parent, own = path.parent.stat(follow_symlinks=False), path.stat(follow_symlinks=False)
    if parent.st_uid not in (0, os.geteuid()) or any(stat.S_IMODE(s.st_mode) & 0o022 for s in (parent, own)):
        raise PermissionDenied(f"{path} is open to others than the node")


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
        with _address(temporary) as name:
            listener.bind(name)
        temporary.chmod(0o600)
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
