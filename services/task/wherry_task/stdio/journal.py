"""The log of a container as its output: the bytes that it wrote, for whoever attaches to a container that logs."""

from __future__ import annotations

import asyncio
import fcntl
import os
from pathlib import Path

from wherry_shared.api.task import LogWindow, Output

from . import logfile
from .logfile import Log, Place
from .watching import Watching

PATIENCE_MAX = 20.0
# How long to wait for a file that nobody may write to any more, where the kernel has no word for it.
LOOK_SECONDS = 0.05
SLOW_SECONDS = 1.0
# Shims v2 keep their logger's pipe open until their task is deleted: so long is waited for what was still in it.
GRACE_SECONDS = 2.0


class Journal:
    """One log that a process writes to, or wrote to. over: the process has ended."""

    def __init__(self, path: Path, watching: Watching, *, over: bool = False) -> None:
        self.path = path
        self._watching = watching
        self.over = over
        self._silent = asyncio.get_running_loop().time() + GRACE_SECONDS
        with Log.open(path) as log:
            self._start = log.end()

    def ended(self) -> None:
        """The process has ended."""
        self.over = True
        self._silent = asyncio.get_running_loop().time() + GRACE_SECONDS
        self._watching.tell(self.path.parent)

    async def read(self, after: str, patience: float) -> Output:
        """What was written behind a place, as soon as there is something."""
        with Log.open(self.path) as log:
            place = log.end() if not after else self._start if after == "start" else Place.parse(after)
        lines, place, gap, ended = await self._wait(place, patience)
        written = logfile.raw(lines)
        return Output(
            stdout=written["stdout"], stderr=written["stderr"], lost_stdout=-1 if gap else 0, next=str(place),
            ended=ended,
        )  # fmt: skip

    async def window(self, place: Place, until: str, patience: float) -> LogWindow:
        """The lines behind a place."""
        lines, place, gap, ended = await self._wait(place, patience)
        if until:
            kept = logfile.cut_after(lines, until)
            ended = ended or len(kept) < len(lines)
            lines = kept
        return LogWindow(lines=lines, next=str(place), gap=gap, ended=ended)

    async def _wait(self, place: Place, patience: float) -> tuple[bytes, Place, bool, bool]:
        loop = asyncio.get_running_loop()
        until = loop.time() + max(0.0, min(patience, PATIENCE_MAX))
        with self._watching.on(self.path.parent) as watched:
            while True:
                # Asked first: what is written before the last writer lets go is seen by the reading behind.
                closed = self.over and (loop.time() > self._silent or not _written(self.path))
                with Log.open(self.path) as log:
                    lines, place, gap = log.read(place)
                if lines or gap or closed:
                    return lines, place, gap, closed and not lines
                left = until - loop.time()
                if left <= 0:
                    return b"", place, False, False
                await watched.change(min(left, LOOK_SECONDS if self.over else SLOW_SECONDS))


def _written(path: Path) -> bool:
    """Whether a monitor still has the log open for writing: it holds a lock on it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
