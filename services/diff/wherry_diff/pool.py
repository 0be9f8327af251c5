"""The processes that extract and compare: seconds of work, which must not hold up whoever asks for something else."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import multiprocessing
import os
import secrets
import signal
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from wherry_shared import context
from wherry_shared.errors import Aborted, DataLoss, Unavailable, WherryError, from_code
from wherry_shared.portions import Portions

from . import apply, compare
from .apply import Application, Applied
from .compare import Compared, Comparison, Redo

T = TypeVar("T")

_PR_SET_NAME, _PR_SET_PDEATHSIG = 15, 1
_PIPE_BYTES = 1 << 20
# So long workers wait for more to do; after the node's start longer, for nothing has been done yet. Forking them again
# takes some 15 ms, idle ones take 15 MiB.
IDLE_SECONDS, FRESH_SECONDS = 3.0, 60.0


class Pool:
    """A few worker processes, as long as there is work. One that dies costs the work in hand; the next call starts new
    ones.

    spool: a directory of ours, for the pipes. One tenant's work, which may take minutes and mean nothing, has all
    workers but one.
    """

    def __init__(self, workers: int, spool: Path) -> None:
        self._workers = workers
        self._spool = spool
        self._executor: ProcessPoolExecutor | None = None
        self._calls = 0
        self._each = Portions(max(1, workers - 1))
        self._ending: asyncio.TimerHandle | None = None

    def _make(self) -> ProcessPoolExecutor:
        # Forked, so that a worker shares what the service has loaded; it touches neither its loop nor its bus.
        fork = multiprocessing.get_context("fork")
        arguments = (os.getpid(), f"{self._spool}/")
        return ProcessPoolExecutor(self._workers, mp_context=fork, initializer=_settle, initargs=arguments)

    async def start(self) -> None:
        """Fork the workers now, while the process is small and quiet."""
        await self._run(os.getpid)
        self._rest_after(FRESH_SECONDS)

    async def apply(self, job: Application) -> Applied:
        """Extract a layer. Raises what `apply.run` does, Unavailable when its worker died."""
        return await self._run(_apply, job)

    async def changes(self, job: Comparison, after: bytes, limit: int) -> tuple[list[tuple[str, bytes]], bytes]:
        """A page of changes. Raises what `compare.changes` does, Unavailable when its worker died."""
        return await self._run(_changes, job, after, limit)

    async def compare(
        self, job: Comparison, write: Callable[[bytes], Awaitable[None]], *, whole: bool = False
    ) -> Compared | Redo:
        """Make a layer and give its bytes to `write`. Raises what `compare.compare` and `write` do, Unavailable when
        its worker died; a cancelled or failed one ends the worker's work at its next write."""
        name = str(self._spool / f"layer-{secrets.token_hex(8)}.pipe")
        os.mkfifo(name, 0o600)
        try:
            reading = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            # Held until the work is done, so that the pipe does not end before the worker has opened it, or never.
            held = os.open(name, os.O_WRONLY | os.O_CLOEXEC)
            fcntl.fcntl(held, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            return await self._piped(name, reading, held, job, write, whole)
        finally:
            os.unlink(name)

    async def _piped(
        self, name: str, reading: int, held: int, job: Comparison, write: Callable[[bytes], Awaitable[None]],
        whole: bool,
    ) -> Compared | Redo:  # fmt: skip
        reader = asyncio.StreamReader(limit=_PIPE_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", 0)
        )
        running: asyncio.Task[Compared | Redo] = asyncio.ensure_future(self._run(_compare, name, job, whole))
        running.add_done_callback(lambda _: os.close(held))
        try:
            while data := await reader.read(_PIPE_BYTES):
                await write(data)
            return await running
        finally:
            transport.close()
            if not running.done():
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([running])

    async def _run(self, function: Callable[..., T | _Failed], *arguments: object) -> T:
        who = context.current().identity
        if who.role != "tenant":
            return await self._run_now(function, *arguments)
        async with self._each.of(who.name):
            return await self._run_now(function, *arguments)

    async def _run_now(self, function: Callable[..., T | _Failed], *arguments: object) -> T:
        loop = asyncio.get_running_loop()
        self._rest_after(None)
        executor = self._executor = self._executor or self._make()
        self._calls += 1
        try:
            answer = await loop.run_in_executor(executor, function, *arguments)
        except BrokenProcessPool:
            if self._executor is executor:
                self._executor = None
            raise Unavailable("the process that did the work died") from None
        finally:
            self._calls -= 1
            if not self._calls:
                self._rest_after(IDLE_SECONDS)
        if isinstance(answer, _Failed):
            raise from_code(answer.code, answer.message)
        return answer

    def _rest_after(self, seconds: float | None) -> None:
        """End the workers then, unless something is asked of them before; None: not for the time being."""
        if self._ending is not None:
            self._ending.cancel()
        loop = asyncio.get_running_loop()
        self._ending = None if seconds is None else loop.call_later(seconds, self._rest)

    def _rest(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)

    def close(self) -> None:
        """End the workers; what they have in hand is abandoned."""
        if self._ending is not None:
            self._ending.cancel()
        if self._executor is None:
            return
        processes = list(getattr(self._executor, "_processes", {}).values())
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


class _Failed:
    """An error on its way out of a worker: code and text."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        self.message = message


def _settle(parent: int, spool: str) -> None:
    """In a new worker: end with the service, and leave its signals and its pipes alone."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NAME, b"wherry-diff-wrk", 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    # One forked in the middle of a comparison would hold both ends of its pipe, and neither side would see it end.
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(spool):
                os.close(fd)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _apply(job: Application) -> Applied | _Failed:
    return _caught(lambda: apply.run(job), job.path)


def _changes(job: Comparison, after: bytes, limit: int) -> tuple[list[tuple[str, bytes]], bytes] | _Failed:
    return _caught(lambda: compare.changes(job, after, limit), "the trees")


def _compare(pipe: str, job: Comparison, whole: bool) -> Compared | Redo | _Failed:
    def work() -> Compared | Redo:
        try:
            # Without O_NONBLOCK this would wait for ever for a service that has given up.
            fd = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise Aborted("nobody waits for this comparison any more") from None
        try:
            os.set_blocking(fd, True)
            return compare.compare(job, lambda data: _write(fd, data), whole=whole)
        finally:
            os.close(fd)

    return _caught(work, "the trees")


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except BrokenPipeError:
        raise Aborted("nobody waits for this comparison any more") from None


def _caught(work: Callable[[], T], what: str) -> T | _Failed:
    try:
        return work()
    except WherryError as e:
        return _Failed(e.code, e.message)
    except OSError as e:
        return _Failed(DataLoss.code, f"{what}: {e.strerror}")
