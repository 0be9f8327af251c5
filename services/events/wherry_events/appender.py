"""One write to the stream at a time: what is asked meanwhile goes together in the next, and is synced together."""

from __future__ import annotations

import asyncio
from collections import deque

from wherry_shared.bus import events
from wherry_shared.bus.transport import Transport
from wherry_shared.errors import WherryError

BATCH = 128
BATCH_BYTES = 1 << 20


class Appender:
    """Appends events in the order in which they come; each caller waits until the stream has its own."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._waiting: deque[tuple[events.Outgoing, asyncio.Future[None]]] = deque()
        self._busy = False
        self._task: asyncio.Task[None] | None = None

    async def append(self, event: events.Outgoing) -> None:
        """Return when the stream has it. Unavailable when it has not."""
        if self._busy:
            done = asyncio.get_running_loop().create_future()
            self._waiting.append((event, done))
            await done
            return
        self._busy = True
        try:
            await events.publish(self._transport, event)
        finally:
            self._busy = False
            if self._waiting:
                self._busy = True
                self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        """Everything that waits, batch after batch."""
        try:
            while self._waiting:
                await self._send(self._next())
        finally:
            self._busy = False
            for _, done in self._waiting:  # only when this was cancelled, with the process
                done.cancel()

    def _next(self) -> list[tuple[events.Outgoing, asyncio.Future[None]]]:
        taken: list[tuple[events.Outgoing, asyncio.Future[None]]] = []
        size = 0
        while self._waiting and len(taken) < BATCH and size < BATCH_BYTES:
            event, done = self._waiting.popleft()
            if not done.done():  # its caller has not given up
                taken.append((event, done))
                size += len(event.data)
        return taken

    async def _send(self, taken: list[tuple[events.Outgoing, asyncio.Future[None]]]) -> None:
        try:
            stored = len(taken) > 1 and await events.publish_together(self._transport, [event for event, _ in taken])
        except WherryError as error:
            for _, done in taken:
                _settle(done, error)
            return
        for event, done in taken:
            try:
                if not stored:
                    await events.publish(self._transport, event)
                _settle(done, None)
            except WherryError as error:
                _settle(done, error)


def _settle(done: asyncio.Future[None], error: WherryError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
