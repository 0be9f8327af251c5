"""The OCI runtime's command line: one child process per verb, and its own words when it fails."""

from __future__ import annotations

import os
import select

from wherry_task.monitor import compact, libc, records, sealed, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LOG_TAIL = 1 << 16
# How the waiting init of a runtime is let go: crun's reads a byte from exec.fifo, runc's writes one into it.
_FIFO_READS = {"runc": os.O_RDONLY, "crun": os.O_WRONLY}
_RELEASE_MS = 10_000
# Verbs that start no process of the container's, but hooks.
_HOOKS_ONLY = ("start", "delete")


class Runtime:
    """One runtime binary, its root directory and global options, bound to one container.

    `binary` is a path or a name to be found on PATH; `root` is the runtime's state directory (`--root`).
    """

    def __init__(self, binary: str, root: str, container: str, options: Sequence[str] = ()) -> None:
        self.binary = binary
        self.name = os.path.basename(binary)
        self.state = os.path.join(root, container)
        self.releases = self.name in _FIFO_READS
        self._container = container
        self._options = ["--root", root, *options]

    def run(self, verb: str, *arguments: str, stdio: Sequence[int] = (), log: str = "", tail: str = "") -> None:
        """Run one verb on the container and wait for it. Raises Failure with the runtime's last error message.

        `stdio` are the descriptors for 0, 1 and 2 (/dev/null without). `log` keeps its log under that name; else the
        call has a log of its own that goes with it, so that calls at the same time do not mix their words.
        """
        path = log or f"log-{os.getpid()}.json"
        line = [self.binary, *self._options, "--log", path, "--log-format", "json", verb, *arguments, self._container]
        start = os.path.getsize(path) if log and os.path.exists(path) else 0
        pid = self._spawn([*line, tail] if tail else line, stdio, hooks_only=verb in _HOOKS_ONLY)
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status:
                words = last_error(path, start) or f"{self.name} ended with status {status}"
                raise wire.Failure(wire.UNKNOWN, f"OCI runtime {verb} failed: {words}")
        finally:
            if not log:
                records.remove(path)

    def _spawn(self, line: list[str], stdio: Sequence[int], *, hooks_only: bool) -> int:
        # crun dies of it when a hook ends before it has read the state. A container must not inherit it ignored.
        default = (libc.SIGXFSZ,) if hooks_only else (libc.SIGPIPE, libc.SIGXFSZ)
        if stdio:
            actions: list[Any] = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdio)]
        else:
            actions = [(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in range(3)]
        program = sealed.program(self.binary)
        while True:
            try:
                # The environment is bare: the container's comes from its spec, and ours is none of its business.
                return os.posix_spawnp(
                    program, line, {"PATH": os.environ.get("PATH", _PATH)},
                    file_actions=actions, setsigmask=(), setsigdef=default,
                )  # fmt: skip
            except OSError as error:
                if program == self.binary:
                    raise wire.failure_of(error, f"OCI runtime {self.binary} cannot be run") from None
                program = self.binary  # a copy may not be executed here

    def release(self, pid: int) -> bool:
        """Let the created init go on without running the runtime's `start` (see the function of this name)."""
        return release(self.binary, self.state, pid)


def release(binary: str, state: str, pid: int) -> bool:
    """Let the created init go on by its exec.fifo, as the runtime's own `start` would, without running that.

    False when that is not possible: another runtime, no fifo, an init that is gone. `start` then tells why.
    Not for a spec with poststart hooks, which are `start`'s to run.
    """
    fifo = os.path.join(state, "exec.fifo")
    direction = _FIFO_READS.get(os.path.basename(binary))
    if direction is None:
        return False
    try:
        init = os.pidfd_open(pid)  # first: opening the fifo already lets runc's init go on, to its very end
    except OSError:
        return False
    try:
        fd = os.open(fifo, direction | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        os.close(init)
        return False
    try:
        done = os.write(fd, b"\0") == 1 if direction == os.O_WRONLY else _read_of_init(fd, init)
    except OSError:
        return False
    finally:
        os.close(fd)
        os.close(init)
    if done:
        records.remove(fifo)  # the runtimes tell created from running by this file
    return done


def _read_of_init(fifo: int, init: int) -> bool:
    """Opened non-blocking, a fifo is silent until its first writer: runc's init may not have come so far yet."""
    waiting = select.poll()
    waiting.register(fifo, select.POLLIN)
    waiting.register(init, select.POLLIN)
    waiting.poll(_RELEASE_MS)
    # Read in any case: it may have written and ended between the two looks of one poll.
    return bool(os.read(fifo, 1))


def removed(binary: str, state: str) -> bool:
    """Whether a container that this runtime has made is no more: its state goes last (`operations.remove`).

    False, too, of a runtime whose state lies elsewhere.
    """
    return os.path.basename(binary) in _FIFO_READS and not os.path.lexists(state)


def last_error(path: str, start: int = 0) -> str:
    """The last message of level error in a runtime's JSON log, from that offset on; "" when there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _LOG_TAIL))
            lines = file.read(_LOG_TAIL).split(b"\n")
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            entry = compact.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
            return str(entry.get("msg", ""))
    return ""
