"""The processes that extract: a layer is seconds of work, and that must not hold up whoever asks for another."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from wherry_shared.errors import DataLoss, Unavailable, WherryError, from_code

from .apply import Applied, apply
from .extract import Target
from .limits import Limits

_PR_SET_NAME, _PR_SET_PDEATHSIG = 15, 1


class Pool:
    """A few worker processes. One that dies costs the layers in hand, and the next call starts new ones."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor = self._make()

    def _make(self) -> ProcessPoolExecutor:
        # Forked, so that a worker shares what the service has loaded; it touches neither its loop nor its bus.
        context = multiprocessing.get_context("fork")
        return ProcessPoolExecutor(self._workers, mp_context=context, initializer=_settle, initargs=(os.getpid(),))

    async def start(self) -> None:
        """Fork the workers now, while the process is small and quiet."""
        await asyncio.get_running_loop().run_in_executor(self._executor, os.getpid)

    async def apply(self, path: str, media_type: str, target: Target, limits: Limits) -> Applied:
        """Extract the layer in the file `path`. Raises what `apply` does, Unavailable when its worker died."""
        executor = self._executor
        try:
            answer = await asyncio.get_running_loop().run_in_executor(
                executor, _apply, path, media_type, target, limits
            )
        except BrokenProcessPool:
            if self._executor is executor:
                self._executor = self._make()
            raise Unavailable(f"the process that extracted {path} died") from None
        if isinstance(answer, Applied):
            return answer
        raise from_code(*answer)

    def close(self) -> None:
        """End the workers; what they have in hand is abandoned."""
        processes = list(getattr(self._executor, "_processes", {}).values())
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def _settle(parent: int) -> None:
    """In a new worker: end with the service, and leave its signals alone."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NAME, b"wherry-diff-wrk", 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _apply(path: str, media_type: str, target: Target, limits: Limits) -> Applied | tuple[int, str]:
    """In a worker. An error travels as code and text."""
    try:
        with open(path, "rb", buffering=0) as source:
            return apply(source, media_type, target, limits)
    except WherryError as e:
        return e.code, e.message
    except OSError as e:
        return DataLoss.code, f"{path}: {e.strerror}"
