"""The answers of calls that carry a key: who waits for one, and what was answered of late.

A second delivery of the same key, while the first is under way or soon after, gets the answer of the first. What
must hold for longer, or beyond the process, is sqlite.Database.mutate's.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from .transport import Publisher

KEEP_SECONDS = 120.0
KEEP_MAX = 4096
KEEP_BYTES = 16 << 20
# Who asks again has given up the first time; a caller that does so for ever fills no memory.
DELIVERIES_MAX = 64

Answer = tuple[bytes, dict[str, str] | None]
"""A body and its headers."""
Back = tuple[Publisher, str]
"""Where an answer goes: the way that the request came, and its reply subject."""


class Answers:
    """Keys with who waits for their answers, and keys with their answers."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Back]] = {}
        self._kept: OrderedDict[str, tuple[Answer, float]] = OrderedDict()
        self._bytes = 0

    def kept(self, key: str) -> Answer | None:
        """The answer that was given to this key."""
        found = self._kept.get(key)
        return found[0] if found else None

    def first(self, key: str, back: Back) -> bool:
        """Whether nothing of this key is under way; from now on `back` waits for its answer, as the last of
        DELIVERIES_MAX."""
        waiting = self._waiting.get(key)
        if waiting is None:
            self._waiting[key] = [back]
            return True
        waiting.append(back)
        if len(waiting) > DELIVERIES_MAX:
            del waiting[0]
        return False

    def settle(self, key: str, answer: Answer | None) -> list[Back]:
        """End what is under way, and keep its answer if there is one to keep; answers who waits for it."""
        if answer is not None:
            self._kept[key] = answer, time.monotonic()
            self._bytes += len(answer[0])
            self._forget()
        return self._waiting.pop(key, [])

    def _forget(self) -> None:
        """Insertion order is age: from the front goes what is old, or over a bound."""
        limit = time.monotonic() - KEEP_SECONDS
        while self._kept:
            answer, at = next(iter(self._kept.values()))
            if at > limit and len(self._kept) <= KEEP_MAX and self._bytes <= KEEP_BYTES:
                return
            self._kept.popitem(last=False)
            self._bytes -= len(answer[0])
