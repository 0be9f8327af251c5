"""A process's outputs and their readers: each reads at its own pace, and the slowest holds the process back.

A reader that has not asked for 10 seconds holds nobody back any more; should it come again, it is told what it
missed. Behind what the readers need, the last 64 KiB are kept. With no reader the process goes on: what it writes is
moved at a bounded pace, so that a container that prints to nobody does not take the service's time.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wherry_shared.api.task import Output
from wherry_shared.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable, WherryError

from .spool import MOVE, Spool

log = logging.getLogger("wherry.task")

STDOUT, STDERR = "stdout", "stderr"
READER_SECONDS = 10.0
READERS_MAX = 64
NOBODY = "-"
WINDOW, KEEP = 1 << 20, 64 << 10
ANSWER_MAX = 256 << 10  # of each stream
# Kept of all streams together before each gets but its least.
BUDGET = 256 << 20
# After each 64 KiB that nobody waits for: 32 MB/s.
IDLE_PAUSE = 0.002
FULL_PAUSE = 0.5
PATIENCE_MAX = 20.0


@dataclass
class Reader:
    """Where one reader is in each stream. asking: how many of its requests wait."""

    places: dict[str, int]
    seen: float
    asking: int = 0


@dataclass
class Budget:
    """What all outlets of the service keep, in bytes."""

    kept: int = 0

    @property
    def window(self) -> int:
        """How far a process may be ahead of its slowest reader."""
        return WINDOW if self.kept < BUDGET else KEEP


class Outlet:
    """The outputs of one process that go over the bus."""

    def __init__(self, directory: Path, streams: list[str], budget: Budget, *, opened: bool) -> None:
        """streams: `stdout`, `stderr` or both, whose FIFOs are in the directory. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._budget = budget
        self._spools: dict[str, Spool] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.readers: dict[str, Reader] = {}
        self.over = False  # the process has ended: its FIFOs may have lost their last writer in silence
        self.epoch = _epoch_of(directory)
        try:
            for stream in streams:
                spool = Spool(directory / stream, directory / f"{stream}.spool", opened=opened)
                self._spools[stream] = spool
                budget.kept += spool.kept
        except OSError:
            self.close()
            raise
        # Whoever made the process, or read it before this service began, has time to come for what is here.
        self._list = directory / "readers"
        for name in self._noted():
            self._expect(name)

    # ---- for readers

    async def read(self, after: str, patience: float) -> Output:
        """What lies behind a place, as soon as there is something; an empty answer after `patience` seconds."""
        name, reader = self._place(after)
        until = self._loop.time() + max(0.0, min(patience, PATIENCE_MAX))
        reader.asking += 1
        self.flow()
        try:
            while True:
                answer = self._answer(name, reader)
                if answer.stdout or answer.stderr or answer.lost_stdout or answer.lost_stderr or answer.ended:
                    break
                if not await self._changed(until - self._loop.time()):
                    break
        finally:
            reader.asking -= 1
            reader.seen = self._loop.time()
        if answer.ended:
            # It holds nobody back, and may ask once more should this answer get lost.
            self.readers.pop(name, None)
        return answer

    def _place(self, after: str) -> tuple[str, Reader]:
        """The reader that asks, where its question says it is."""
        if after in ("", "start"):
            self.readers.pop("", None) if after else None
            name = secrets.token_hex(6)
            places = {s: spool.low if after else spool.head for s, spool in self._spools.items()}
        else:
            name, places = self._parse(after)
        reader = self.readers.get(name)
        if reader is None:
            if len(self.readers) >= READERS_MAX:
                self.prune()
            if len(self.readers) >= READERS_MAX:
                raise ResourceExhausted(f"{READERS_MAX} readers are attached already")
            reader = self.readers[name] = Reader(places, self._loop.time())
            self._note()
        reader.places = places
        return name, reader

    def _parse(self, after: str) -> tuple[str, dict[str, int]]:
        """A place as `_next` writes it. NotFound: of another process that had this name."""
        words = after.split(".")
        if len(words) != 2 + len(self._spools) or not all(w.isalnum() and w.isascii() and len(w) < 20 for w in words):
            raise InvalidArgument(f"{after[:80]!r} is no place in this output")
        if words[0] != self.epoch:
            raise NotFound("the process whose output that was is gone")
        if not all(word.isdecimal() for word in words[2:]):
            raise InvalidArgument(f"{after[:80]!r} is no place in this output")
        places = {s: int(word) for s, word in zip(self._spools, words[2:], strict=True)}
        if any(place > self._spools[s].head for s, place in places.items()):
            raise InvalidArgument(f"{after[:80]!r} is beyond the end of this output")
        return words[1], places

    def _answer(self, name: str, reader: Reader) -> Output:
        if not self._spools:
            raise Unavailable("the service is stopping")
        data, lost, following = {STDOUT: b"", STDERR: b""}, {STDOUT: 0, STDERR: 0}, []
        for stream, spool in self._spools.items():
            begin = max(reader.places[stream], spool.low)
            lost[stream] = begin - reader.places[stream]
            data[stream] = spool.read(begin, ANSWER_MAX)
            following.append(begin + len(data[stream]))
        ended = all(s.ended and place == s.head for s, place in zip(self._spools.values(), following, strict=True))
        return Output(
            stdout=data[STDOUT], stderr=data[STDERR], lost_stdout=lost[STDOUT], lost_stderr=lost[STDERR],
            next=".".join([self.epoch, name, *map(str, following)]), ended=ended,
        )  # fmt: skip

    async def _changed(self, patience: float) -> bool:
        if patience <= 0:
            return False
        change: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(change)
        try:
            done, _ = await asyncio.wait([change], timeout=patience)
        finally:
            if change in self._waiting:
                self._waiting.remove(change)
        return bool(done)

    # ---- from the process

    def flow(self) -> None:
        """Go on moving whatever the readers leave room for, and forget what none of them needs."""
        for stream, spool in self._spools.items():
            try:
                self._forget(stream, spool)
            except WherryError as e:
                log.error("%s", e)
            if stream in self._timers:
                continue
            if self.over and not spool.ended:
                self._pause(stream, spool, 0)
            else:
                self._go_on(stream, spool)

    def _go_on(self, stream: str, spool: Spool) -> None:
        spool.listen((lambda: self._move(stream, spool)) if self._room(stream, spool) > 0 else None)

    def _room(self, stream: str, spool: Spool) -> int:
        if not self.readers:
            return MOVE
        return self._budget.window - (spool.head - min(r.places[stream] for r in self.readers.values()))

    def _forget(self, stream: str, spool: Spool) -> None:
        before = min([spool.head - KEEP, *(r.places[stream] for r in self.readers.values())])
        kept = spool.kept
        spool.forget(before)
        self._budget.kept += spool.kept - kept

    def _move(self, stream: str, spool: Spool) -> None:
        spool.opened = True
        try:
            moved = spool.move(self._room(stream, spool))
        except WherryError as e:
            log.error("%s", e)
            self._pause(stream, spool, FULL_PAUSE)
            return
        self._budget.kept += moved
        if moved or spool.ended:
            self._wake()
        if spool.ended:
            return
        if not self.readers and moved:
            self._forget(stream, spool)
            self._pause(stream, spool, IDLE_PAUSE)
        elif self.over and moved:
            # The last writer may be gone without an event to come.
            self._pause(stream, spool, 0)
        else:
            self._go_on(stream, spool)

    def _pause(self, stream: str, spool: Spool, seconds: float) -> None:
        spool.listen(None)

        def again() -> None:
            self._timers.pop(stream, None)
            if self._room(stream, spool) > 0:
                self._move(stream, spool)
            else:
                self._go_on(stream, spool)

        self._timers[stream] = self._loop.call_later(seconds, again)

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            if not change.done():
                change.set_result(None)

    # ---- times

    def started(self) -> None:
        """The process begins: its maker has from now on time to come and read."""
        if not self.readers:
            self._expect("")
        elif "" in self.readers:
            self.readers[""].seen = self._loop.time()
        self.flow()

    def ended(self) -> None:
        """The process has ended, or was never started and is gone: look for the end of its streams."""
        self.over = True
        for spool in self._spools.values():
            spool.opened = True
        self.flow()

    def prune(self) -> None:
        """Forget the readers that are gone; what they had not read is no longer held back."""
        now = self._loop.time()
        gone = [n for n, r in self.readers.items() if not r.asking and now - r.seen > READER_SECONDS]
        for name in gone:
            del self.readers[name]
        if gone:
            self._note()
            self.flow()

    @property
    def idle(self) -> bool:
        """Whether the process and its streams have ended, and nobody reads."""
        return self.over and not self.readers and not self._waiting and all(s.ended for s in self._spools.values())

    @property
    def waiting(self) -> int:
        """How many requests wait for something to read."""
        return len(self._waiting)

    def _expect(self, name: str) -> None:
        self.readers[name] = Reader({s: spool.low for s, spool in self._spools.items()}, self._loop.time())

    def _noted(self) -> list[str]:
        """Who reads, as an earlier service knew it; "" is the process's maker, who has not come yet."""
        try:
            return [name for name in self._list.read_text().split(",") if name != NOBODY]
        except FileNotFoundError:
            return [""]

    def _note(self) -> None:
        with suppress(OSError):  # a full disk, or a process that is gone already
            self._list.write_text(",".join(self.readers) or NOBODY)

    def close(self) -> None:
        """Let go; the files stay, and another service may go on from them."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for spool in self._spools.values():
            self._budget.kept -= spool.kept
            spool.ended = True
            spool.close()
        self._spools = {}
        self.readers.clear()
        self._wake()


def _epoch_of(directory: Path) -> str:
    """What tells this process's output from that of another that had its name."""
    path = directory / "epoch"
    try:
        return path.read_text()
    except FileNotFoundError:
        epoch = secrets.token_hex(4)
        path.write_text(epoch)
        return epoch
