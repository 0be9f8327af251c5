"""What lives and what is dead: a cut of all records, marked from its roots, and mended by what changed since.

The cut is not of one moment: pages are read one after the other. That is sound since every record that changed after
the first page is in a journal, and `revive` takes each of those for alive with whatever it refers to now.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from wherry_shared.references import CONTAINERS, INGESTS, LEASES, Node, Ref, decode, nodes

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip
_FLAT, _ALIVE = 1, 2
_NEVER_SWEPT = (LEASES, CONTAINERS)


class Graph:
    """Nodes are numbers here; those that nobody reported may be referred to all the same. now: unix time."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._numbers: dict[tuple[str, str], dict[str, int]] = {}
        self._places: list[tuple[str, str, str]] = []
        self._there: list[int] = []
        self._hard: dict[int, list[int]] = {}
        self._soft: defaultdict[int, list[int]] = defaultdict(list)
        self._roots: list[int] = []
        self._flat_roots: list[int] = []
        self._conditions: list[tuple[int, int, str, float]] = []
        self._used: dict[int, list[float]] = {}
        self._state = bytearray()
        self.expires = 0.0
        """When the first of what lives by itself ends to (unix time, 0: nothing does)."""

    def __len__(self) -> int:
        return len(self._there)

    # ---- the cut

    def add(self, page: bytes) -> bytes:
        """Take a page of all records; answers where the next begins, b"" after the last."""
        after, groups = decode(page)
        for node in nodes(groups):
            self._add(node)
        found: bytes = after
        return found

    def _add(self, node: Node) -> None:
        number = self._number(node.namespace, (node.type, node.key))
        self._there.append(number)
        if node.type == LEASES:
            self._add_lease(node)
            return
        if node.root:
            self._roots.append(number)
            if node.until:
                self.expires = min(self.expires or node.until, node.until)
        if node.hard:
            self._hard[number] = self._all(node, node.hard)
        if node.soft:
            self._soft[number] += self._all(node, node.soft)
        for holder in self._all(node, node.back):
            self._soft[holder].append(number)
        for type, key, compare, seconds in node.conditions:
            self._conditions.append((number, self._number(node.namespace, (type, key)), compare, seconds))
        if node.used:
            self._used[number] = node.used

    def _add_lease(self, node: Node) -> None:
        """A lease that is void has no resources here. Ingests are kept with their blob by a flat one too."""
        for ref in node.hard:
            flat = node.flat and ref[0] != INGESTS
            (self._flat_roots if flat else self._roots).append(self._number(node.namespace, ref))

    def _all(self, node: Node, refs: Iterable[Ref]) -> list[int]:
        return [self._number(node.namespace, ref) for ref in refs]

    def _number(self, namespace: str, ref: Ref) -> int:
        type, key = ref
        known = self._numbers.setdefault((type, namespace), {})
        number = known.get(key)
        if number is None:
            number = known[key] = len(self._places)
            self._places.append((type, namespace, key))
        return number

    # ---- what lives

    def mark(self) -> None:
        """Everything is known: see what the roots reach."""
        for number, snapshot, compare, seconds in self._conditions:
            if any(_COMPARE[compare](self._now - used, seconds) for used in self._used.get(snapshot, ())):
                self._soft[number].append(snapshot)
        self._state = bytearray(len(self._places))
        self._reach(self._roots)
        self._reach_flat()

    def _reach(self, numbers: Iterable[int]) -> None:
        """Everything that is reached from here lives."""
        state, hard, soft = self._state, self._hard, self._soft
        stack = list(numbers)
        while stack:
            number = stack.pop()
            if number >= len(state):
                state.extend(bytes(len(self._places) - len(state)))
            if state[number] != _ALIVE:
                state[number] = _ALIVE
                stack += hard.get(number, ())
                stack += soft.get(number, ())

    def _reach_flat(self) -> None:
        state, stack = self._state, list(self._flat_roots)
        while stack:
            number = stack.pop()
            if not state[number]:
                state[number] = _FLAT
                stack += self._hard.get(number, ())

    def revive(self, page: bytes) -> tuple[int, bool]:
        """Take a page of changes: what changed lives, and what it refers to, as of now or of the cut.

        Answers the page's head: the last sequence number, and whether there are more.
        """
        last, more, groups = decode(page)
        for node in nodes(groups):
            number = self._number(node.namespace, (node.type, node.key))
            refs = [*node.hard, *node.soft, *(c[:2] for c in node.conditions)]
            self._reach([*self._all(node, refs), number] if not node.gone else ())
            self._forget(number)
        return int(last), bool(more)

    def _forget(self, number: int) -> None:
        """What is gone is swept no more, and keeps nothing."""
        if number >= len(self._state):
            self._state.extend(bytes(len(self._places) - len(self._state)))
        self._state[number] = self._state[number] or _FLAT

    # ---- what is dead

    def is_dead(self, number: int) -> bool:
        return not self._state[number]

    def place(self, number: int) -> tuple[str, str, str]:
        """Type, namespace and key."""
        return self._places[number]

    def dead(self) -> list[list[int]]:
        """The dead, each before what it refers to; what refers to each other in a circle stands together."""
        wanted = {n for n in self._there if not self._state[n] and self._places[n][0] not in _NEVER_SWEPT}
        found = list(_components(wanted, lambda n: [*self._hard.get(n, ()), *self._soft.get(n, ())]))
        return found[::-1]

    def count(self, numbers: Iterable[int]) -> dict[str, int]:
        """How many of each type."""
        counts: dict[str, int] = {}
        for number in numbers:
            counts[self._places[number][0]] = counts.get(self._places[number][0], 0) + 1
        return counts


def _components(wanted: set[int], edges: Callable[[int], list[int]]) -> Iterator[list[int]]:
    """The strongly connected components, each after those that it refers to (Tarjan's algorithm, without recursion)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    path: list[int] = []
    on_path: set[int] = set()
    for start in wanted:
        if start in order:
            continue
        work: list[tuple[int, Any]] = [(start, None)]
        while work:
            node, targets = work.pop()
            if targets is None:
                order[node] = low[node] = len(order)
                path.append(node)
                on_path.add(node)
                targets = iter([n for n in edges(node) if n in wanted])
            descended = False
            for target in targets:
                if target not in order:
                    work += [(node, targets), (target, None)]
                    descended = True
                    break
                if target in on_path:
                    low[node] = min(low[node], order[target])
            if descended:
                continue
            if work:
                above = work[-1][0]
                low[above] = min(low[above], low[node])
            if low[node] == order[node]:
                cut = path.index(node) if path[-1] != node else len(path) - 1
                yield path[cut:]
                on_path.difference_update(path[cut:])
                del path[cut:]
