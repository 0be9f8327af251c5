"""A process's stdin over the bus: who writes into it, and how far each has come.

A writer's bytes have offsets of its own, so that what is delivered twice is taken once. How far each has come is
written down before and after each write: a service that was killed in between does not know whether those bytes
arrived, and says so instead of sending them again.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from wherry_shared.api.task import Taken
from wherry_shared.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

# So many fit into one page, which is written whole or not at all when the service is killed. The oldest are forgotten.
WRITERS_MAX = 30
PATIENCE_MAX = 20.0
_RECORD = 4096


class Inlet:
    """The stdin of one process that comes over the bus. A FIFO in its directory; opened when the first bytes come."""

    def __init__(self, directory: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._fifo = directory / "stdin"
        self._fd = -1
        self._record = os.open(directory / "stdin.writers", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        known: dict[str, Any] = json.loads(os.pread(self._record, _RECORD, 0) or b"{}")
        self._totals: dict[str, int] = known.get("totals", {})
        self._unsure: dict[str, int] = {}
        self.ended: bool = known.get("ended", False)
        if under_way := known.get("under_way"):
            writer, size = under_way
            self._totals[writer] = self._totals.get(writer, 0) + size
            self._unsure[writer] = size
        self._waiting: list[asyncio.Future[None]] = []

    @staticmethod
    def make(directory: Path) -> None:
        """Make the FIFO of a new stream. ResourceExhausted."""
        try:
            os.mkfifo(directory / "stdin", 0o600)
        except OSError as e:
            raise ResourceExhausted(f"{directory / 'stdin'}: {e.strerror}") from None

    async def write(self, writer: str, offset: int, data: bytes, patience: float) -> Taken:
        """Take what the writer has not given before, as far as the FIFO has room within `patience` seconds."""
        if offset < 0:
            raise InvalidArgument(f"offset {offset} is negative")
        until = self._loop.time() + max(0.0, min(patience, PATIENCE_MAX))
        while True:
            if self._record < 0:
                raise FailedPrecondition("the process has ended")
            total = self._totals.get(writer, 0)
            rest = data[total - offset :] if offset <= total else b""
            if self.ended and rest:
                raise FailedPrecondition("stdin is closed")
            if not rest or self._take(writer, rest) or not await self._room(until - self._loop.time()):
                return Taken(total=self._totals.get(writer, 0), unsure=self._unsure.pop(writer, 0))

    def _take(self, writer: str, data: bytes) -> int:
        """Write what fits; answers how much that was."""
        self._open()
        data = data[: 64 << 10]
        self._totals[writer] = self._totals.pop(writer, 0)
        if len(self._totals) > WRITERS_MAX:
            del self._totals[next(iter(self._totals))]
        self._note(under_way=[writer, len(data)])
        try:
            taken = os.write(self._fd, data)
        except BlockingIOError:
            taken = 0
        except BrokenPipeError:
            taken = len(data)  # nobody reads it any more, as with any pipe
        self._totals[writer] += taken
        self._note()
        return taken

    def _open(self) -> None:
        if self._fd >= 0:
            return
        try:
            # With a reading end of its own it neither waits for a reader nor fails for want of one.
            self._fd = os.open(self._fifo, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as e:
            raise ResourceExhausted(f"{self._fifo}: {e.strerror}") from None

    def _note(self, under_way: list[Any] | None = None) -> None:
        """Into the page cache, which outlives this process, and that in one piece."""
        if self._record < 0:
            return
        known = {"totals": self._totals, "ended": self.ended, "under_way": under_way}
        os.pwrite(self._record, json.dumps(known).encode().ljust(_RECORD), 0)

    async def _room(self, patience: float) -> bool:
        if patience <= 0:
            return False
        room: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(room)
        self._loop.add_writer(self._fd, self._wake)
        try:
            done, _ = await asyncio.wait([room], timeout=patience)
        finally:
            if room in self._waiting:
                self._waiting.remove(room)
            if not self._waiting and self._fd >= 0:
                self._loop.remove_writer(self._fd)
        return bool(done)

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._fd >= 0:
            self._loop.remove_writer(self._fd)
        for room in waiting:
            if not room.done():
                room.set_result(None)

    def end(self) -> None:
        """The end comes behind what was taken; whoever holds another writing end has to close it, too."""
        if not self.ended:
            self.ended = True
            self._note()
        self._close_fifo()

    def close(self) -> None:
        """Let go; another service may go on with it."""
        self._close_fifo()
        if self._record >= 0:
            os.close(self._record)
            self._record = -1

    def _close_fifo(self) -> None:
        self._wake()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
