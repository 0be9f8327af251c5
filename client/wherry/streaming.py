"""A process's streams over the bus: asked for and given in windows, so that nothing is lost or repeated when a service,
the bus or the connection is away for a while."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from wherry_shared import context
from wherry_shared.api.task import Stdio as Paths
from wherry_shared.api.task import Taken
from wherry_shared.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WherryError,
)

from .nearby import is_here
from .outgoing import chunks, write_all, write_now
from .stdio import Pipes, Sink, Stdio, Unwritten, failure_of, forget, part

if TYPE_CHECKING:
    from .client import Client

T = TypeVar("T")
log = logging.getLogger(__name__)

PATIENCE = 5.0
# A service that is restarted is back sooner; whoever sits at a terminal wants to know.
OUTAGE_SECONDS = 60.0
DRAIN_SECONDS = 10.0
# Who has not asked for 10 seconds holds a process back no more.
WORD_SECONDS = 3.0
# `bus` or `fifo`, for streams that do not say themselves.
WAY = "WHERRY_STDIO"
_PASSING = (Unavailable, DeadlineExceeded, ResourceExhausted)


def carrier(client: Client, container_id: str, exec_id: str, stdio: Stdio) -> Pipes | Streaming:
    """What will carry the streams of a process that is about to be made: FIFOs where the node is this host."""
    remote = stdio.remote
    if remote is None and (way := os.environ.get(WAY, "")):
        remote = way == "bus"
    if stdio.log is not None or stdio.detach_keys or remote or (remote is None and not is_here(client)):
        return Streaming(client, container_id, exec_id, stdio)
    name = f"{container_id[:40]}-{exec_id}" if exec_id else container_id[:60]
    return Pipes(stdio, client.address.state, client.namespace, name)


class Streaming:
    """The streams of one process over the bus. joining: somebody else made it, and its stdin is not ours to end."""

    def __init__(
        self, client: Client, container_id: str, exec_id: str, stdio: Stdio, *, joining: bool = False
    ) -> None:  # fmt: skip
        self._client = client
        self._process = container_id, exec_id
        self._stdio = stdio
        self._joining = joining
        self._after = "" if joining else "start"
        self._moved = 0
        self._held = False  # what came waits for whoever reads it from us
        self._tasks: list[asyncio.Task[None]] = []
        self._output: asyncio.Task[None] | None = None
        self._runs = asyncio.Event()  # before, there may be what its runtime wrote of a failure: it is in the error
        self._parted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.paths = _paths(stdio)

    # ---- as of Pipes

    def start(self, on_stdin_end: Callable[[], None]) -> None:
        """Nothing is to be prepared: the end of stdin goes along with its last bytes."""

    def begin(self) -> None:
        """The process is made: from here on its output is asked for."""
        if self._stdio.log is None and (self._stdio.stdout is not None or self._stdio.stderr is not None):
            self._output = self._run(self._read())

    def started(self) -> None:
        """The process runs: it may be given input, and what it writes is its own."""
        self._runs.set()
        if self._stdio.log is None and self._stdio.stdin is not None:
            self._run(self._write(self._stdio.stdin))

    @property
    def closed(self) -> bool:
        """Streams over the bus that are lost say so themselves (`parted`)."""
        return False

    def end_stdin(self) -> None:
        """Its end has been told already."""

    async def join(self) -> None:
        """Take up the streams of a running process. Raises what the node refuses with."""
        self._after = (await self._client.tasks.output(*self._process, self._after, 0.0)).next
        self.begin()
        self.started()

    async def parted(self) -> None:
        """Return when the detach keys were typed; raise what ended the streams before the process, and
        BrokenPipeError when nobody reads our own output any more."""
        await asyncio.shield(self._parted)

    @property
    def failure(self) -> Unwritten | None:
        """What kept our output from being written."""
        return failure_of(self._parted)

    async def drained(self, patience: float = DRAIN_SECONDS) -> None:
        """Return when all output has come, or nothing has for `patience` seconds, although it was asked for."""
        while self._output is not None and not self._output.done():
            before = self._moved
            done, _ = await asyncio.wait([self._output], timeout=patience)
            if not done and self._moved == before and not self._held:
                return

    def close(self) -> None:
        """Let go; the process goes on."""
        for task in self._tasks:
            task.cancel()
        forget(self._parted)

    def _run(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(self._guarded(work))
        self._tasks.append(task)
        return task

    async def _guarded(self, work: Any) -> None:
        try:
            await work
        except (WherryError, OSError) as e:
            log.warning("the streams of %s: %s", self._process[0], e)
            if not self._parted.done():
                self._parted.set_exception(e if isinstance(e, WherryError) else Unavailable(str(e)))

    # ---- output

    async def _read(self) -> None:
        while True:
            try:
                got = await self._outlasting(lambda: self._client.tasks.output(*self._process, self._after, PATIENCE))
            except NotFound:
                return  # deleted: there is nothing any more
            await self._runs.wait()
            await self._put(self._stdio.stdout, got.lost_stdout, got.stdout, got.next)
            await self._put(self._stdio.stderr, got.lost_stderr, got.stderr, got.next)
            self._moved += len(got.stdout) + len(got.stderr)
            self._after = got.next
            if got.ended:
                return

    async def _put(self, sink: int | Sink | None, lost: int, data: bytes, next: str) -> None:
        if sink is None or not (lost or data):
            return
        if lost:
            data = marker(lost) + data
        if callable(sink):
            sink(data)
            return
        try:
            if rest := write_now(sink, data):
                await self._put_slowly(sink, rest, next)
        except OSError as e:  # what comes is dropped
            part(self._parted, e)

    async def _put_slowly(self, sink: int, data: memoryview, next: str) -> None:
        """Wait for whoever reads it from us; who asks for what comes next meanwhile, loses nothing of that."""
        self._held, writing = True, asyncio.ensure_future(write_all(sink, data))
        try:
            while not (await asyncio.wait([writing], timeout=WORD_SECONDS))[0]:
                with contextlib.suppress(WherryError), context.use(timeout=WORD_SECONDS):
                    await self._client.tasks.output(*self._process, next, 0.0)
            await writing
        finally:
            self._held = False
            writing.cancel()

    async def _outlasting(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call until it is answered, through restarts of services and bus; Unavailable when that takes long."""
        loop = asyncio.get_running_loop()
        pause, give_up = 0.05, 0.0
        while True:
            try:
                return await call()
            except _PASSING as e:
                give_up = give_up or loop.time() + OUTAGE_SECONDS
                if loop.time() > give_up:
                    raise Unavailable(f"lost the streams of {self._process[0]}: {e}") from None
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)

    # ---- input

    async def _write(self, source: int | bytes) -> None:
        writer, given, keys = secrets.token_hex(8), 0, Keys(self._stdio.detach_keys)
        with contextlib.suppress(NotFound, FailedPrecondition):  # it has ended, or somebody has closed its stdin
            async with contextlib.aclosing(chunks(source)) as given_us:
                async for chunk in given_us:
                    data, typed = keys.sift(chunk)
                    given = await self._give(writer, given, data)
                    if typed:
                        if not self._parted.done():
                            self._parted.set_result(None)
                        return
            given = await self._give(writer, given, keys.withheld)
            if not self._joining:
                await self._give(writer, given, b"", eof=True)

    async def _give(self, writer: str, given: int, data: bytes, *, eof: bool = False) -> int:
        """All of it, however often the process lets us wait; answers how much that is in all."""
        begin = given
        while given < begin + len(data) or eof:
            rest = data[given - begin :]
            taken = await self._outlasting(self._giving(writer, given, rest, eof))
            if taken.unsure:
                text = f"[{taken.unsure} bytes of input may be lost]\r\n"
                await self._put(self._stdio.stdout, 0, text.encode(), self._after)
            if taken.total < given:
                raise Unavailable(f"{given - taken.total} bytes of input were lost")
            given, eof = taken.total, eof and taken.total < given + len(rest)
        return given

    def _giving(self, writer: str, offset: int, data: bytes, eof: bool) -> Callable[[], Awaitable[Taken]]:
        container, exec_id = self._process
        return lambda: self._client.tasks.input(container, writer, offset, data, exec_id, eof, PATIENCE)


def marker(lost: int) -> bytes:
    """What stands where bytes are missing; -1: nobody knows how many."""
    return f"[{lost} bytes lost]\r\n".encode() if lost > 0 else b"[bytes lost]\r\n"


def _paths(stdio: Stdio) -> Paths:
    stdin = "" if stdio.stdin is None else "bus://"
    if stdio.log is not None:
        output = f"log://?{stdio.log}" if stdio.log else "log://"
        return Paths(stdin=stdin, stdout=output, stderr="" if stdio.terminal else output, terminal=stdio.terminal)
    stderr = "" if stdio.stderr is None or stdio.terminal else "bus://"
    return Paths(
        stdin=stdin, stdout="" if stdio.stdout is None else "bus://", stderr=stderr, terminal=stdio.terminal
    )  # fmt: skip


class Keys:
    """Looks for the detach keys in what is typed. `withheld`: what may be their beginning."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self.withheld = b""

    def sift(self, data: bytes) -> tuple[bytes, bool]:
        """What is to be passed on, and whether the keys were typed, behind which nothing is."""
        if not self._keys:
            return data, False
        data, self.withheld = self.withheld + data, b""
        found = data.find(self._keys)
        if found >= 0:
            return data[:found], True
        for length in range(min(len(self._keys) - 1, len(data)), 0, -1):
            if data.endswith(self._keys[:length]):
                self.withheld = data[-length:]
                return data[:-length], False
        return data, False
