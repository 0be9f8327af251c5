"""The last event that the stream is known to have: what shows that it has lost its end, also over restarts.

nats-server cuts off what it finds damaged when it starts, and gives the numbers again. Who reads on from before the cut
would meet no hole then: so all tokens become void.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from wherry_shared.bus.transport import EventLog, LogState, Transport
from wherry_shared.errors import Unavailable, WherryError

log = logging.getLogger(__name__)

SECONDS = 1.0
DIGEST_LENGTH = 12


def digest(data: bytes) -> str:
    """What tells an event from another of the same number."""
    return hashlib.blake2b(data, digest_size=DIGEST_LENGTH // 2).hexdigest()


class _Known(NamedTuple):
    epoch: str
    sequence: int
    digest: str


class Mark:
    """Sees to it that the stream's epoch changes when the stream lost its end."""

    def __init__(
        self, stream: EventLog, transport: Transport, path: Path | None = None,
        make: Callable[[], Awaitable[None]] | None = None,
    ) -> None:  # fmt: skip
        """path: the file that keeps the mark, once a second; None for a mark that ends with this process.

        make: makes the stream where it is not there any more: somebody deleted it, or nats-server lost its directory.
        """
        self._stream = stream
        self._make = make
        self._transport = transport
        self._path = path
        self._kept = _load(path) if path is not None else None
        self._newest: tuple[int, bytes] | None = None  # what was acknowledged since then; no digest is made of each
        self._doubtful = True  # the stream may have been opened again since it was looked at
        self._changes = 0  # of the connection
        self._checking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        transport.on_state.append(self._on_state)

    async def start(self) -> None:
        """Follow the stream: what others put into it is known too, a second later."""
        await self._look()
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        self._transport.on_state.remove(self._on_state)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            with contextlib.suppress(WherryError, TimeoutError, OSError):
                async with asyncio.timeout(SECONDS):
                    await self._look()

    def _on_state(self, connected: bool) -> None:
        self._doubtful = True
        self._changes += 1

    def has(self, sequence: int, data: bytes) -> None:
        """The stream acknowledged an event as this number."""
        if self._kept is not None and not self._doubtful:
            if sequence > (self._newest[0] if self._newest is not None else self._kept.sequence):
                self._newest = sequence, data
            else:  # a second time, or again
                self._doubtful = True

    @property
    def _known(self) -> _Known | None:
        if self._newest is not None and self._kept is not None:
            (sequence, data), self._newest = self._newest, None
            self._kept = _Known(self._kept.epoch, sequence, digest(data))
        return self._kept

    def _know(self, known: _Known) -> None:
        self._kept, self._newest = known, None

    async def state(self) -> LogState:
        """The stream's state; its epoch is another one when it has lost what it was known to have."""
        known = self._known  # before it is asked: what is acknowledged meanwhile, its answer may not have yet
        state = await self._stream.state()
        if known is None or known.epoch != state.epoch:
            await self._begin(state)
        elif state.last < known.sequence or self._doubtful:
            async with self._checking:
                return await self._check()
        return state

    async def _check(self) -> LogState:
        known = self._known
        state = await self._stream.state()
        if known is None or known.epoch != state.epoch:
            return state
        self._doubtful = False
        try:
            lost = state.last < known.sequence or (state.first <= known.sequence and not await self._has(known))
        except BaseException:
            self._doubtful = True
            raise
        if lost:
            log.error("the stream has lost events up to number %d: damage, or a crash", known.sequence)
            await self._stream.renew()
            state = await self._stream.state()
            await self._begin(state)
        return state

    async def _begin(self, state: LogState) -> None:
        """Whatever the stream has now is what it has."""
        changes = self._changes
        found = await self._stream.read(after=state.last - 1, limit=1) if state.last else []
        last = (found[0].sequence, digest(found[0].data)) if found else (0, "")
        if changes == self._changes:
            self._know(_Known(state.epoch, *last))
            self._doubtful = False

    async def _has(self, known: _Known) -> bool:
        if not known.sequence:
            return True
        found = await self._stream.read(after=known.sequence - 1, limit=1)
        return bool(found) and found[0].sequence == known.sequence and digest(found[0].data) == known.digest

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(SECONDS)
            try:
                await self._look()
            except Unavailable as error:
                log.debug("the stream cannot be looked at: %s", error)
                await self._make_again()
            except (WherryError, OSError) as error:
                log.debug("the stream cannot be looked at: %s", error)

    async def _make_again(self) -> None:
        """Events wait in outboxes until there is a stream."""
        if self._make is None or not self._transport.connected:
            return
        try:
            await self._make()
        except WherryError as error:
            log.warning("the stream cannot be looked at, and not be made: %s", error)

    async def _look(self) -> None:
        """Bring the mark to the stream's end, and keep it."""
        state, before = await self.state(), self._known
        if before is None or self._doubtful:
            return
        if state.last > before.sequence:
            await self._begin(state)
        if self._path is not None and self._known != _load(self._path):
            new = self._path.with_name(self._path.name + ".new")
            new.write_text(json.dumps(self._known))
            os.replace(new, self._path)


def _load(path: Path) -> _Known | None:
    """What the file says; None when it says nothing."""
    try:
        epoch, sequence, known = json.loads(path.read_text())
        return _Known(str(epoch), int(sequence), str(known))
    except (OSError, ValueError, TypeError):
        return None
