"""Whose turn it is: how much of a service one tenant may have at a time.

A few hundred requests that take their time, of which there are some in every contract, would have everybody else of the
node wait for them. So a tenant has a part of each bound, all tenants together leave a part to the node's own services
and the admin, and of what has to wait, each caller's first is taken in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from ..context import Identity

T = TypeVar("T")

_ONE = 4  # a tenant's part of a bound: the fourth; that of all tenants: what is left without one of these


class Shares:
    """What is taken of one bound, by whom."""

    def __init__(self) -> None:
        self.taken = 0
        self._tenants = 0
        self._each: dict[str, int] = {}

    def fits(self, who: Identity, most: int, size: int = 1) -> bool:
        """Whether `who` may take `size` more of `most`; a tenant that has nothing of it may, however large that is."""
        if self.taken + size > most:
            return False
        own = self._each.get(who.name, 0)
        return not own or (own + size <= most // _ONE and self._tenants + size <= most - most // _ONE)

    def take(self, who: Identity, size: int = 1) -> None:
        self.taken += size
        if who.role == "tenant":
            self._tenants += size
            self._each[who.name] = self._each.get(who.name, 0) + size

    def give(self, who: Identity, size: int = 1) -> None:
        """Give back what was taken."""
        self.taken -= size
        if who.role == "tenant":
            self._tenants -= size
            left = self._each.pop(who.name) - size
            if left:
                self._each[who.name] = left


class Backlog(Generic[T]):
    """What waits for its turn: a caller's own in its order, and callers by turns."""

    def __init__(self) -> None:
        self._of: dict[str, deque[tuple[Identity, int, T]]] = {}
        self._count, self._bytes = Shares(), Shares()

    def __len__(self) -> int:
        return self._count.taken

    def fits(self, who: Identity, size: int, most: int, most_bytes: int) -> bool:
        """Whether there is room for a request of `size` bytes."""
        return self._count.fits(who, most) and self._bytes.fits(who, most_bytes, size)

    def put(self, who: Identity, size: int, request: T) -> None:
        self._of.setdefault(who.name, deque()).append((who, size, request))
        self._count.take(who)
        self._bytes.take(who, size)

    def take(self, may: Callable[[Identity], bool]) -> T | None:
        """The next one of a caller that may; none when nobody may who waits."""
        for name, waiting in self._of.items():
            who, size, request = waiting[0]
            if may(who):
                waiting.popleft()
                del self._of[name]
                if waiting:
                    self._of[name] = waiting  # behind the others
                self._count.give(who)
                self._bytes.give(who, size)
                return request
        return None
