"""What a process reads and writes, and how it gets there over FIFOs on this host.

The client makes the FIFOs and reads them without ever blocking; the monitor at the other end holds them open. From
another host, and wherever several shall be able to attach, streams go over the bus instead: streaming.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from wherry_shared.api.task import Stdio as Paths
from wherry_shared.errors import Unavailable

from .outgoing import CHUNK, chunks, ready, write_all, write_now

Sink = Callable[[bytes], None]
# How often it is looked whether output waits for its reader here.
LOOK_SECONDS = 0.25
COLLECT_MAX = 16 << 20


@dataclass(frozen=True)
class Stdio:
    """What a process reads and writes: file descriptors of this process, or callbacks for output; None is nothing.

    terminal: one stream for all output, with a terminal at the process's end. remote: over the bus, where others can
    attach too (True), over FIFOs, which takes a client on the node (False), or whichever is there (None). log: nobody
    listens now; the node keeps what is written, for `Container.logs` and whoever attaches, as the options say
    (`max_size=BYTES&max_files=N`, "" for 5 files of 16 MiB); with `stdin` open for them, if that is not None.
    detach_keys: typed on `stdin`, they let go of the process.
    """

    stdin: int | bytes | None = None
    stdout: int | Sink | None = None
    stderr: int | Sink | None = None
    terminal: bool = False
    remote: bool | None = None
    log: str | None = None
    detach_keys: bytes = b""

    @classmethod
    def logged(cls, *, stdin: bool = False, terminal: bool = False, options: str = "") -> Stdio:
        """Of a process in the background: its output is logged; `stdin` stays open for who attaches."""
        return cls(stdin=b"" if stdin else None, terminal=terminal, log=options)

    @classmethod
    def inherit(cls, *, terminal: bool = False) -> Stdio:
        """The caller's own stdin, stdout and stderr."""
        return cls(sys.stdin.fileno(), sys.stdout.fileno(), sys.stderr.fileno(), terminal)

    @classmethod
    def null(cls) -> Stdio:
        """Nothing to read, and what is written is dropped."""
        return cls()

    @classmethod
    def output(cls) -> Stdio:
        """The caller's stdout and stderr, nothing to read."""
        return cls(None, sys.stdout.fileno(), sys.stderr.fileno())


class Unwritten(Unavailable):
    """Our own output cannot be written any more, and what was to come is lost."""


@dataclass
class Collected:
    """Keeps what a stream gave, up to a bound; `truncated` says that there was more."""

    limit: int = COLLECT_MAX
    truncated: bool = False
    data: bytearray = field(default_factory=bytearray)

    def __call__(self, chunk: bytes) -> None:
        room = self.limit - len(self.data)
        self.truncated = self.truncated or len(chunk) > room
        self.data += chunk[:room]


class Pipes:
    """The FIFOs of one process, and the pumps between them and a Stdio."""

    def __init__(self, stdio: Stdio, state: Path, namespace: str, name: str) -> None:
        self._stdio = stdio
        self._directory: Path | None = None
        self._readers: list[_Reader] = []
        self._writer: _Writer | None = None
        self._parted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.paths = Paths(terminal=stdio.terminal)
        if stdio.stdin is not None or stdio.stdout is not None or stdio.stderr is not None:
            self._make(state, f"{namespace}:{name}")

    def _make(self, state: Path, name: str) -> None:
        base = state / "fifo"
        try:
            base.mkdir(mode=0o700, exist_ok=True)
            self._directory = base / f"{name}-{secrets.token_hex(4)}"
            self._directory.mkdir(mode=0o700)
        except OSError:
            self._directory = Path(tempfile.mkdtemp(prefix="wherry-fifo-"))
        made: dict[str, str] = {}
        wanted = {"stdin": self._stdio.stdin, "stdout": self._stdio.stdout, "stderr": self._stdio.stderr}
        if self._stdio.terminal:
            del wanted["stderr"]
        for stream, end in wanted.items():
            if end is not None:
                path = self._directory / stream
                os.mkfifo(path, 0o600)
                made[stream] = str(path)
        self.paths = Paths(terminal=self._stdio.terminal, **made)

    def begin(self) -> None:
        """The process is made."""

    def started(self) -> None:
        """The process runs. What its runtime wrote of a failure before is in the error, and nobody's output."""
        for reader in self._readers:
            reader.listen()

    async def parted(self) -> None:
        """Raise BrokenPipeError when nobody reads our own output any more, Unavailable when it cannot be written.

        Only over the bus can a process be left."""
        await asyncio.shield(self._parted)

    @property
    def failure(self) -> Unwritten | None:
        """What kept our output from being written."""
        return failure_of(self._parted)

    def start(self, on_stdin_end: Callable[[], None]) -> None:
        """Open this side; `on_stdin_end` is called once when the caller's stdin has ended."""
        for path, sink in ((self.paths.stdout, self._stdio.stdout), (self.paths.stderr, self._stdio.stderr)):
            if path and sink is not None:
                self._readers.append(_Reader(path, sink, self._parted))
        if self.paths.stdin and self._stdio.stdin is not None:
            self._writer = _Writer(self.paths.stdin, self._stdio.stdin, on_stdin_end)

    @property
    def closed(self) -> bool:
        """Whether nothing is left at the other end of its outputs: a monitor holds them as long as there is a task."""
        return bool(self._readers) and all(reader.ended.is_set() for reader in self._readers)

    def end_stdin(self) -> None:
        """Close this side of stdin: what was written is read, then comes the end."""
        if self._writer is not None:
            self._writer.close()

    async def drained(self, patience: float = 10.0) -> None:
        """Return when every output has ended, or after `patience` seconds (something else holds it open).

        The time in which it waits for whoever reads it from us does not count.
        """
        loop = asyncio.get_running_loop()
        for reader in self._readers:
            while not reader.ended.is_set() and patience > 0:
                begun, held = loop.time(), reader.held
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(patience, LOOK_SECONDS)):
                        await reader.ended.wait()
                if not (held or reader.held):
                    patience -= loop.time() - begun

    def close(self) -> None:
        """Let go of the FIFOs and remove them."""
        for reader in self._readers:
            reader.close()
        forget(self._parted)
        if self._writer is not None:
            self._writer.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def part(parted: asyncio.Future[None], e: OSError) -> None:
    """Our own output cannot be written any more."""
    if not parted.done():
        gone = isinstance(e, BrokenPipeError)
        parted.set_exception(e if gone else Unwritten(f"the output cannot be written: {e.strerror}"))


def failure_of(parted: asyncio.Future[None]) -> Unwritten | None:
    """What kept our own output from being written."""
    error = parted.exception() if parted.done() and not parted.cancelled() else None
    return error if isinstance(error, Unwritten) else None


def forget(future: asyncio.Future[None]) -> None:
    """Nobody asks any more how it comes out."""
    if future.done() and not future.cancelled():
        future.exception()  # whoever wanted to know has asked
    future.cancel()


class _Reader:
    """FIFO -> descriptor or callback, whenever there is something. parted: is told when nobody reads the descriptor,
    and then what comes is dropped."""

    def __init__(self, path: str, sink: int | Sink, parted: asyncio.Future[None]) -> None:
        # Without a writer yet, a FIFO opened like this gives no event and no end: it waits.
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._sink: int | Sink | None = sink
        self._parted = parted
        self._giving: asyncio.Task[None] | None = None
        self.ended = asyncio.Event()

    @property
    def held(self) -> bool:
        """Whether what was read waits for room in the descriptor."""
        return self._giving is not None

    def listen(self) -> None:
        if not self.ended.is_set():
            asyncio.get_running_loop().add_reader(self._fd, self._ready)

    def _ready(self) -> None:
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
        elif callable(self._sink):
            self._sink(data)
        elif self._sink is not None:
            self._put(self._sink, data)

    def _put(self, sink: int, data: bytes) -> None:
        try:
            rest = write_now(sink, data)
        except OSError as e:
            self._part(e)
            return
        if rest:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._giving = asyncio.get_running_loop().create_task(self._give(sink, rest))

    async def _give(self, sink: int, rest: memoryview) -> None:
        try:
            await write_all(sink, rest)
        except OSError as e:
            self._part(e)
        self._giving = None
        self.listen()

    def _part(self, e: OSError) -> None:
        self._sink = None
        part(self._parted, e)

    def close(self) -> None:
        if self._giving is not None:
            self._giving.cancel()
        if not self.ended.is_set():
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self.ended.set()


class _Writer:
    """Descriptor or bytes -> FIFO, as it has room. The caller's descriptor is read as long as this is open: what comes
    there later is somebody else's."""

    def __init__(self, path: str, source: int | bytes, on_end: Callable[[], None]) -> None:
        # O_RDWR never fails for want of a reader; the end of input is told by close_stdin.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._on_end = on_end
        self._closed = False
        self._pumping = asyncio.get_running_loop().create_task(self._pump(source))

    async def _pump(self, source: int | bytes) -> None:
        with contextlib.suppress(OSError):
            async with contextlib.aclosing(chunks(source)) as given:
                async for chunk in given:
                    await self._write(memoryview(chunk))
        # Not closed yet: what is in a FIFO is gone with its last opener, and the process may not have begun.
        self._on_end()

    async def _write(self, view: memoryview) -> None:
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await ready(self._fd, select.EPOLLOUT)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._pumping.cancel()
            os.close(self._fd)
