"""How much each of many may have at a time, so that none of them keeps the others waiting."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary


class Portions:
    """A semaphore of `most` for each name; one that nobody has or waits for takes no memory."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._each: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def of(self, name: str) -> asyncio.Semaphore:
        return self._each.setdefault(name, asyncio.Semaphore(self._most))
