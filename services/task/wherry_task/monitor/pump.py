"""Bytes from a descriptor to a sink through the loop, with at most one buffer in hand."""

from __future__ import annotations

import fcntl
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Loop(Protocol):
        """What turns a pump: the monitor, or a log writer of its own."""

        pending: list[Callable[[], bool]]
        logs: dict[str, LogFile]

        def watch(self, fd: int, events: int, handler: Callable[[int, int], None]) -> None: ...

        def unwatch(self, fd: int) -> None: ...

    class Sink(Protocol):
        """Where bytes go. `write` takes what it can and returns the rest; `fd` tells when to try again."""

        fd: int

        def write(self, data: bytes) -> bytes: ...

        def close(self) -> None: ...


_CHUNK = 32768
_LINE = 16384
_SECOND = 10**9
_STAMP = 30
_PARTIAL_SECONDS = 0.02


class Pump:
    """Reads only while nothing is pending, so a sink that does not take bytes stops the writer behind the source."""

    def __init__(self, loop: Loop, source: int, sink: Sink) -> None:
        self.source = source
        self.sink = sink
        self._loop = loop
        self._pending = b""
        self.open = True
        os.set_blocking(source, False)
        loop.watch(source, select.POLLIN, self._readable)

    def _readable(self, fd: int, events: int) -> None:
        try:
            data = os.read(self.source, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # EIO: nobody holds the terminal's other side any more
        if data:
            self._push(data)
        else:
            self.close()

    def _push(self, data: bytes) -> None:
        self._pending = self.sink.write(data)
        if self._pending:
            self._loop.unwatch(self.source)
            self._loop.watch(self.sink.fd, select.POLLOUT, self._writable)

    def _writable(self, fd: int, events: int) -> None:
        before = len(self._pending)
        self._pending = self.sink.write(self._pending)
        if self._pending and len(self._pending) == before and events & (select.POLLHUP | select.POLLERR):
            self.close()  # a hung-up terminal takes nothing and would wake us for ever
        elif not self._pending:
            self._loop.unwatch(self.sink.fd)
            self._loop.watch(self.source, select.POLLIN, self._readable)

    def release(self) -> None:
        """The writers have ended: an unread FIFO is no longer to stop the pump."""
        if isinstance(self.sink, FifoSink):
            self.sink.release()

    def drained(self) -> bool:
        """Move what can be moved now; True when nothing is left between the source and the sink."""
        while self.open and not self._pending:
            readable = select.poll()
            readable.register(self.source, select.POLLIN)
            if not readable.poll(0):
                return True
            self._readable(self.source, 0)
        return not self.open

    def close(self) -> None:
        """Close both ends; what is pending is lost. A second call does nothing."""
        if self.open:
            self.open = False
            self._loop.unwatch(self.sink.fd if self._pending else self.source)
            os.close(self.source)
            self.sink.close()


class FifoSink:
    """A FIFO or a terminal's master; `held` is a reading end that keeps writes from failing while no client reads."""

    def __init__(self, fd: int, held: int = -1) -> None:
        self.fd = fd
        self._held = held
        os.set_blocking(fd, False)

    def write(self, data: bytes) -> bytes:
        """Bytes for which no reader is left are dropped: there is nobody to tell."""
        try:
            return data[os.write(self.fd, data) :]
        except BlockingIOError:
            return data
        except OSError:
            return b""

    def release(self) -> None:
        """Stop standing in for a reader: from now on an unread FIFO no longer stops the pump."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def close(self) -> None:
        self.release()
        os.close(self.fd)


class FileSink:
    """A plain file, appended to. A full disk loses bytes, never blocks the container; the file says how many."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lost = 0

    def write(self, data: bytes) -> bytes:
        try:
            if self._lost:
                os.write(self.fd, b"[%d bytes lost]\n" % self._lost)
                self._lost = 0
            while data:
                data = data[os.write(self.fd, data) :]
        except OSError:
            self._lost += len(data)
        return b""

    def close(self) -> None:
        os.close(self.fd)


class LogFile:
    """A file of `TIME STREAM P|F LINE` lines (the CRI log format) that is rotated by size; shared by both streams.

    It is locked as long as somebody writes: so whoever reads it knows that more may come.
    """

    def __init__(self, fd: int, path: str, max_size: int, max_files: int) -> None:
        self.fd = fd
        self.path = path
        self._max_size = max_size
        self._max_files = max_files
        self._users = 0
        self._lost, self._lost_at = 0, ""
        self._last = self._second = 0
        self._prefix = ""
        fcntl.flock(fd, fcntl.LOCK_SH)
        self._size = os.fstat(fd).st_size

    def append(self, lines: list[bytes]) -> None:
        """Whole lines; rotates whenever the next would pass the size. A full disk loses them; the log says how much."""
        if self._lost:
            lines = [f"{self._lost_at} stdout F [{self._lost} bytes lost]\n".encode(), *lines]
        begin, room = 0, self._max_size - self._size
        for end, line in enumerate(lines):
            if len(line) > room and self._max_size and (end > begin or self._size):
                if not (self._put(lines[begin:end]) and self._rotate()):
                    self._lose(lines[end:])
                    return
                begin, room = end, self._max_size
            room -= len(line)
        self._put(lines[begin:])

    def _put(self, lines: list[bytes]) -> bool:
        """All of them or none."""
        data = whole = b"".join(lines)
        try:
            while data:
                data = data[os.write(self.fd, data) :]
        except OSError:
            if os.fstat(self.fd).st_size == self._size + len(whole) - len(data):
                os.ftruncate(self.fd, self._size)
            self._lose(lines)
            return False
        if whole:
            self._size += len(whole)
            self._lost = 0
        return True

    def _lose(self, lines: list[bytes]) -> None:
        if not self._lost:
            self._lost_at = lines[0][:_STAMP].decode()
        elif lines[0].startswith(self._lost_at.encode()):
            lines = lines[1:]  # says what is counted already
        self._lost += sum(len(line.split(b" ", 3)[3]) for line in lines)

    def _rotate(self) -> bool:
        fresh = f"{self.path}.new"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(fresh, flags, 0o600)
        except OSError:
            return False  # before anything has another name
        fcntl.flock(fd, fcntl.LOCK_SH)
        for number in range(self._max_files - 1, 0, -1):
            older = self.path if number == 1 else f"{self.path}.{number - 1}"
            if os.path.exists(older):
                os.rename(older, f"{self.path}.{number}")
        os.rename(fresh, self.path)
        os.close(self.fd)
        self.fd, self._size = fd, 0
        return True

    def stamp(self) -> str:
        """The time, later than that of every line before: files of a log are known by the time of their first line."""
        now = time.time_ns()
        if 0 <= self._last - now < _SECOND:  # more than that, and somebody has set the clock back
            now = self._last + 1
        self._last = now
        second, rest = divmod(now, _SECOND)
        if second != self._second:
            self._second, self._prefix = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._prefix}.{rest:09d}Z"

    def sink(self, loop: Loop, stream: str) -> LogSink:
        """One stream's way into the file; the file is closed with the last of them."""
        self._users += 1
        return LogSink(loop, self, stream)

    def release(self) -> None:
        self._users -= 1
        if not self._users:
            os.close(self.fd)

    @property
    def users(self) -> int:
        """How many streams still write into it."""
        return self._users


class LogSink:
    """Cuts one stream into lines; what is longer than 16 KiB, or unfinished a moment later, is marked P (partial).

    So the log has everything that the container wrote: a prompt, and a last line without an end.
    """

    def __init__(self, loop: Loop, file: LogFile, stream: str) -> None:
        self._loop = loop
        self._due = 0.0  # when the unfinished line is written as it is; 0 while nothing waits for that
        self._file = file
        self._stream = stream
        self._rest = b""
        self.fd = file.fd

    def write(self, data: bytes) -> bytes:
        begun = not self._rest or b"\n" in data  # what is left over is another line than before
        *lines, self._rest = (self._rest + data).split(b"\n")
        out = [self._format(line, b"F") for line in lines]
        while len(self._rest) >= _LINE:
            out.append(self._format(self._rest[:_LINE], b"P"))
            self._rest = self._rest[_LINE:]
        if out:
            self._file.append(out)
        if self._rest and begun:
            if not self._due:
                self._loop.pending.append(self._waited)
            self._due = time.monotonic() + _PARTIAL_SECONDS
        return b""

    def _waited(self) -> bool:
        """Every tick: a line that has been unfinished for long is written as it is."""
        if self._rest and time.monotonic() < self._due:
            return False
        self._due = 0.0
        self._put_rest()
        return True

    def _put_rest(self) -> None:
        if self._rest:
            self._file.append([self._format(self._rest, b"P")])
            self._rest = b""

    def _format(self, line: bytes, tag: bytes) -> bytes:
        return f"{self._file.stamp()} {self._stream} ".encode() + tag + b" " + line + b"\n"

    def close(self) -> None:
        self._put_rest()
        self._file.release()


def make(loop: Loop, role: bytes, fds: list[int]) -> Pump:
    """The pump that a worker's role describes, with its descriptors taken from the front of `fds`.

    `input` (source, sink), `file` (source, sink), `fifo` (source, sink, held reader), and
    `log:STREAM:MAX_SIZE:MAX_FILES:PATH` (source, sink).
    """
    source, out = fds.pop(0), fds.pop(0)
    if role == b"fifo":
        return Pump(loop, source, FifoSink(out, fds.pop(0)))
    if role == b"input":
        return Pump(loop, source, FifoSink(out))
    if role == b"file":
        return Pump(loop, source, FileSink(out))
    _, stream, size, files, path = role.decode().split(":", 4)
    file = loop.logs.get(path)
    if file is None or not file.users:
        file = loop.logs[path] = LogFile(out, path, int(size), int(files))
    else:
        os.close(out)  # both streams of a process, and those of its execs, share one file and one rotation
    return Pump(loop, source, file.sink(loop, stream))
