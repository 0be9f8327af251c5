"""What was asked and is not answered yet: a future by its reply subject, and one timer for all of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from math import inf

from ..errors import DeadlineExceeded, WherryError
from .protocol import Message

Asked = tuple[asyncio.Future[Message], str, float]
"""One request's answer, its subject, and when its caller gives up (the loop's time)."""


class Waiting:
    """The requests under way whose answers come to one inbox."""

    def __init__(self, inbox: str) -> None:
        """inbox: a subject's beginning that nobody else uses; its last token is put here."""
        self._inbox = inbox + "."
        self._loop = asyncio.get_running_loop()
        self._tokens = itertools.count(1)
        self._asked: dict[str, Asked] = {}
        self._patience = inf  # when `_give_up` looks next

    def __len__(self) -> int:
        return len(self._asked)

    def __iter__(self) -> Iterator[tuple[str, Asked]]:
        """Reply subjects and what was asked."""
        return iter(self._asked.items())

    def ask(self, subject: str, timeout: float) -> tuple[str, asyncio.Future[Message]]:
        """The reply subject of a new request, and its answer: DeadlineExceeded after `timeout` seconds."""
        if timeout <= 0:
            raise DeadlineExceeded(f"the deadline had passed before {subject} was asked")
        answer: asyncio.Future[Message] = self._loop.create_future()
        reply = f"{self._inbox}{next(self._tokens):x}"
        until = self._loop.time() + timeout
        self._asked[reply] = answer, subject, until
        if until < self._patience:
            self._patience = until
            self._loop.call_at(until, self._give_up, until)
        return reply, answer

    def forget(self, reply: str) -> None:
        """Nobody waits for it any more."""
        self._asked.pop(reply, None)

    def take(self, reply: str) -> Asked | None:
        """Whom an answer is for, who then waits no more; None when nobody does."""
        asked = self._asked.pop(reply, None)
        return None if asked is None or asked[0].done() else asked

    def fail(self, error: Callable[[str], WherryError]) -> None:
        """End all of them; `error` makes what each raises of its subject."""
        for answer, subject, _ in self._asked.values():
            if not answer.done():
                answer.set_exception(error(subject))

    def _give_up(self, planned: float) -> None:
        """End what was not answered in time. One timer for all requests: one each costs more than the rest of it."""
        if planned != self._patience:
            return  # an earlier one has taken its place
        now, self._patience = self._loop.time() + 0.001, inf
        for answer, subject, until in self._asked.values():
            if until > now:
                self._patience = min(self._patience, until)
            elif not answer.done():
                answer.set_exception(DeadlineExceeded(f"{subject} was not answered in time"))
        if self._patience < inf:
            self._loop.call_at(self._patience, self._give_up, self._patience)
