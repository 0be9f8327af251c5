"""What a process gets as its standard streams, and what the monitor keeps open for it (containerd's rules).

A FIFO is handed to the container as it is and no byte passes through the monitor. A plain pipe and a copying loop, as
containerd's shim has, are only needed where the runtime library cannot pass the FIFO on; here it saves two copies, a
wake-up per write and 64 KiB, and keeps three promises without code:
* a client that leaves gives the container no SIGPIPE: the monitor holds a reading end of its outputs;
* a client that comes back sees no early end: the container itself is the writer, so the end comes exactly when the
  last of its processes has closed the stream - holding a writing end here would hide that end, so none is held;
* stdin does not end with the attached client: the monitor holds a writing end, which `close_stdin` closes.
The runtime changes the FIFO's owner to the container's user, as it does with pipes. Where an LSM forbids a container
the use of a host FIFO (SELinux enforcing), `copy` puts a pipe in between.

A plain file is never handed over: the container could truncate, rewrite or chmod it through /proc/self/fd/1.
A terminal's master cannot be handed over either. Both go through pumps.
"""

from __future__ import annotations

import os
import stat

from wherry_task.monitor import wire
from wherry_task.monitor.logger import Logger

_LOG_SIZE, _LOG_FILES, _MAX_LOG_FILES = 16 << 20, 5, 1000


class Stdio:
    """The three streams of one process, opened by a worker: `child` is for the process, `kept` for the monitor.

    `kept` are (role, descriptors) pairs, as pump.make and Monitor take them.
    """

    def __init__(self, copy: bool = False) -> None:
        self.child: list[int] = []
        self.kept: list[tuple[str, list[int]]] = []
        self._copy = copy
        self._terminal_in = -1
        self._terminal_out: tuple[str, list[int]] | None = None
        self._logger: Logger | None = None

    def open(self, stdin: str, stdout: str, stderr: str, terminal: bool) -> None:
        """Open the client's ends; "" is /dev/null. With a terminal, `attach` follows. Raises Failure; never blocks."""
        try:
            if terminal:
                self._open_for_terminal(stdin, stdout)
                return
            self.child.append(self._open_stdin(stdin))
            if stdout.startswith("binary://"):
                self._open_logger(stdout)
                return
            for stream, uri in (("stdout", stdout), ("stderr", stderr)):
                self.child.append(self._open_output(stream, uri))
        except OSError as error:
            raise wire.failure_of(error, f"open stdio {error.filename or ''}".rstrip()) from None

    def attach(self, master: int) -> None:
        """Join a terminal's master to the opened ends; it goes to the monitor as well, for its size."""
        self.kept.append(("master", [master]))
        if self._terminal_in >= 0:
            self.kept.append(("input", [self._terminal_in, os.dup(master)]))
        if self._terminal_out is not None:
            role, fds = self._terminal_out
            self.kept.append((role, [os.dup(master), *fds]))

    def abandon(self) -> None:
        """The process could not be made: what was started for it goes."""
        if self._logger is not None:
            self._logger.kill()

    def _open_logger(self, uri: str) -> None:
        """The container writes into the logger's pipes itself; as with FIFOs, only reading ends are held."""
        self._logger = logger = Logger(uri)
        self.child += [logger.stdout, logger.stderr]
        self.kept += [("hold", [logger.stdout_end]), ("hold", [logger.stderr_end]), (f"logger:{logger.pid}", [])]

    def _open_for_terminal(self, stdin: str, stdout: str) -> None:
        if stdin:
            self._terminal_in = _fifo(stdin)
            self.kept.append(("stdin", [_reopen(self._terminal_in, os.O_WRONLY)]))
        if stdout.startswith("binary://"):
            self._logger = logger = Logger(stdout)
            self.kept.append((f"logger:{logger.pid}", []))
            self._terminal_out = "fifo", [logger.stdout, logger.stdout_end]
            os.close(logger.stderr)
            os.close(logger.stderr_end)
            return
        # With no stdout the output is still read, or the container would stop at a full terminal.
        self._terminal_out = self._sink("stdout", stdout)

    def _open_stdin(self, path: str) -> int:
        if not path:
            return os.open("/dev/null", os.O_RDONLY)
        reader = _fifo(path)
        self.kept.append(("stdin", [_reopen(reader, os.O_WRONLY)]))
        if not self._copy:
            os.set_blocking(reader, True)
            return reader
        inner, writer = os.pipe()
        self.kept.append(("input", [reader, writer]))
        return inner

    def _open_output(self, stream: str, uri: str) -> int:
        if not uri:
            return os.open("/dev/null", os.O_WRONLY)
        if not self._copy and _is_fifo(uri):
            held = _fifo(uri)
            self.kept.append(("hold", [held]))
            writer = _reopen(held, os.O_WRONLY)
            os.set_blocking(writer, True)
            return writer
        role, fds = self._sink(stream, uri)
        reader, writer = os.pipe()
        self.kept.append((role, [reader, *fds]))
        return writer

    def _sink(self, stream: str, uri: str) -> tuple[str, list[int]]:
        """Where a pump writes: a FIFO or plain file by its path, `file:///path`, or `log:///path?max_size=&max_files=`."""
        if not uri:
            return "file", [os.open("/dev/null", os.O_WRONLY)]
        scheme, separator, rest = uri.partition("://")
        if not separator:
            if _is_fifo(uri):
                held = _fifo(uri)
                return "fifo", [_reopen(held, os.O_WRONLY), held]
            return "file", [_append_to(uri, 0)]
        path, _, query = rest.partition("?")
        if scheme not in ("file", "log"):
            raise wire.Failure(wire.UNIMPLEMENTED, f"stdio scheme {scheme}:// is not known")
        if not path.startswith("/") or not path.isprintable():
            raise wire.Failure(wire.INVALID, f"{uri!r} does not name a file")
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        fd = _append_to(path, os.O_CREAT)
        if scheme == "file":
            return "file", [fd]
        size, files = _log_limits(query)
        return f"log:{stream}:{size}:{files}:{path}", [fd]


def _log_limits(query: str) -> tuple[int, int]:
    options = dict(word.split("=", 1) for word in query.split("&") if "=" in word)
    try:
        size, files = int(options.get("max_size", _LOG_SIZE)), int(options.get("max_files", _LOG_FILES))
    except ValueError:
        raise wire.Failure(wire.INVALID, f"log options {query!r}: not numbers") from None
    if size < 0 or not 1 <= files <= _MAX_LOG_FILES:
        raise wire.Failure(wire.INVALID, f"log options {query!r}: out of bounds")
    return size, files


def _is_fifo(path: str) -> bool:
    return "://" not in path and stat.S_ISFIFO(os.lstat(path).st_mode)


def _fifo(path: str) -> int:
    """A non-blocking reading end; only of a FIFO, and not through a symbolic link."""
    if not _is_fifo(path):
        raise wire.Failure(wire.INVALID, f"{path} is not a FIFO")
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise wire.Failure(wire.INVALID, f"{path} is not a FIFO")
    return fd


def _reopen(fd: int, flags: int) -> int:
    """Another opening of the very same FIFO, whatever its path names by now."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK)


def _append_to(path: str, flags: int) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise wire.Failure(wire.INVALID, f"{path} is neither a FIFO nor a plain file")
    return fd
