"""A program that takes a process's output: `binary:///program?key=value`, as containerd's shim runs it.

It gets the outputs as its descriptors 3 and 4, and closes 5 to say that it is ready. Its arguments are the
keys and values in their order; CONTAINER_ID and CONTAINER_NAMESPACE are in its environment. It sees the end of its
input when the container's last writer has gone, and is killed when it is still there ten seconds later.
"""

from __future__ import annotations

import fcntl
import os
import select

from wherry_task.monitor import libc, records, wire

_READY_SECONDS = 10
_FIRST_FREE = 10  # above those that are its own, so that none of them is overwritten while they are put in place
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Logger:
    """A running logger: `pid`, and the writing and reading ends of its two pipes."""

    def __init__(self, uri: str) -> None:
        """Start it and wait until it is ready. Raises Failure, OSError."""
        path, _, query = uri.partition("://")[2].partition("?")
        if not path.startswith("/"):
            raise wire.Failure(wire.INVALID, f"{uri!r} does not name a program")
        (self.stdout_end, self.stdout), (self.stderr_end, self.stderr) = _pipe(), _pipe()
        ready, telling = _pipe()
        null = os.open("/dev/null", os.O_RDWR)
        given = [(null, 0), (null, 1), (null, 2), (self.stdout_end, 3), (self.stderr_end, 4), (telling, 5)]
        about = records.read(records.ABOUT)
        namespace = os.path.basename(os.path.dirname(about["bundle"]))
        try:
            self.pid = os.posix_spawn(
                path, [path, *_arguments(query)],
                {"PATH": _PATH, "CONTAINER_ID": about["container"], "CONTAINER_NAMESPACE": namespace},
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in given],
                setsigmask=(), setsigdef=(libc.SIGPIPE, libc.SIGXFSZ),
            )  # fmt: skip
        except OSError as error:
            raise wire.failure_of(error, f"logger {path} cannot be run") from None
        os.close(telling)
        os.close(null)
        self._await(ready, path)

    def _await(self, ready: int, path: str) -> None:
        waiting = select.poll()
        waiting.register(ready, select.POLLIN)
        told = waiting.poll(_READY_SECONDS * 1000)
        said = os.read(ready, 1) if told else b"?"
        os.close(ready)
        # One that is on its way out has closed everything, and is not to be waited for yet.
        if os.waitpid(self.pid, os.WNOHANG) != (0, 0) or (not said and not os.path.exists(f"/proc/{self.pid}/fd/3")):
            raise wire.Failure(wire.UNKNOWN, f"logger {path} has ended at once")
        if said:
            self.kill()
            raise wire.Failure(wire.UNKNOWN, f"logger {path} does not say that it is ready, by closing descriptor 5")

    def kill(self) -> None:
        """End it at once."""
        libc.kill(self.pid, libc.SIGKILL)


def _pipe() -> tuple[int, int]:
    """Its reading and its writing end, with high numbers."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


def _arguments(query: str) -> list[str]:
    found = []
    for word in query.split("&"):
        key, _, value = word.partition("=")
        found += [_decoded(part) for part in (key, value) if part]
    return found


def _decoded(text: str) -> str:
    """Percent-encoding undone. Raises Failure."""
    first, *rest = text.replace("+", " ").encode().split(b"%")
    try:
        plain = first + b"".join(bytes.fromhex(part[:2].decode()) + part[2:] for part in rest)
        if b"\0" in plain or any(len(part) < 2 for part in rest):
            raise ValueError(text)
        return plain.decode()
    except ValueError:
        raise wire.Failure(wire.INVALID, f"logger argument {text!r} is not percent-encoded") from None
