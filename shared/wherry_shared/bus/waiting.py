"""What was asked and is not answered yet: who waits, by the reply subject, and one timer for all of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from math import inf

from ..errors import DeadlineExceeded, WherryError
from .protocol import Message
from .transport import Answer

Asked = tuple[Answer, str, float]
"""Whom one request's answer is for, its subject, and when its caller gives up (the loop's time)."""


class Waiting:
    """The requests under way whose answers come to one inbox."""

    def __init__(self, inbox: str) -> None:
        """inbox: a subject's beginning that nobody else uses; its last token is put here."""
        self._inbox = inbox + "."
        self._loop = asyncio.get_running_loop()
        self._tokens = itertools.count(1)
        self._asked: dict[str, Asked] = {}
        self._patience = inf  # when `_give_up` looks next
        self._over: asyncio.Event | None = None  # where somebody waits for the end of all

    def __len__(self) -> int:
        return len(self._asked)

    def __iter__(self) -> Iterator[tuple[str, Asked]]:
        """Reply subjects and what was asked."""
        return iter(self._asked.items())

    def ask(self, subject: str, timeout: float) -> tuple[str, asyncio.Future[Message]]:
        """The reply subject of a new request, and its answer: DeadlineExceeded after `timeout` seconds."""
        answer: asyncio.Future[Message] = self._loop.create_future()
        return self.expect(answer, subject, timeout), answer

    def expect(self, answer: Answer, subject: str, timeout: float) -> str:
        """The reply subject of a new request whose answer is told to `answer`."""
        if timeout <= 0:
            raise DeadlineExceeded(f"the deadline had passed before {subject} was asked")
        reply = f"{self._inbox}{next(self._tokens):x}"
        until = self._loop.time() + timeout
        self._asked[reply] = answer, subject, until
        if until < self._patience:
            self._patience = until
            self._loop.call_at(until, self._give_up, until)
        return reply

    def forget(self, reply: str) -> None:
        """Nobody waits for it any more."""
        self._asked.pop(reply, None)
        if self._over is not None:
            self._look()

    def take(self, reply: str) -> Asked | None:
        """Whom an answer is for, who then waits no more; None when nobody does."""
        asked = self._asked.pop(reply, None)
        if self._over is not None:
            self._look()
        return None if asked is None or asked[0].done() else asked

    def fail(self, error: Callable[[str], WherryError]) -> None:
        """End all of them; `error` makes what each raises of its subject."""
        asked, self._asked = self._asked, {}
        self._look()
        for answer, subject, _ in asked.values():
            if not answer.done():
                answer.set_exception(error(subject))

    def refuse(self, reply: str, error: WherryError) -> None:
        """End one of them."""
        asked = self.take(reply)
        if asked is not None:
            asked[0].set_exception(error)

    async def over(self) -> None:
        """Return when nobody waits any more."""
        self._over = self._over or asyncio.Event()
        self._look()
        await self._over.wait()

    def _look(self) -> None:
        if self._over is not None:
            if self._asked:
                self._over.clear()
            else:
                self._over.set()

    def _give_up(self, planned: float) -> None:
        """End what was not answered in time. One timer for all requests: one each costs more than the rest of it."""
        if planned != self._patience:
            return  # an earlier one has taken its place
        now, self._patience = self._loop.time() + 0.001, inf
        for reply, (_, subject, until) in list(self._asked.items()):
            if until > now:
                self._patience = min(self._patience, until)
            else:
                self.refuse(reply, DeadlineExceeded(f"{subject} was not answered in time"))
        if self._patience < inf:
            self._loop.call_at(self._patience, self._give_up, self._patience)
