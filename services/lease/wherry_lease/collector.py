"""One garbage collection over all services: a cut, a mark, and sweeps in short freezes (docs/decisions/0010).

Nothing is swept unless every service answered. A service that dies, or a collection that does, leaves garbage for the
next one, and never something alive without what it refers to: what refers goes before what it refers to.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from wherry_shared import context
from wherry_shared.api.gc import Collectable, Collected, Dead
from wherry_shared.api.lease import Resource
from wherry_shared.errors import Unavailable, WherryError
from wherry_shared.references import CONTENT, IMAGES, INGESTS, SNAPSHOTS, encode_dead

from .graph import Graph

log = logging.getLogger("wherry.lease.gc")

EPOCH_SECONDS = 600.0
# A freeze that nobody ends is over after so long; a sweep needs half of it left (wherry_shared.epoch).
FREEZE_SECONDS = 4.0
PATIENCE = 5.0
"""Seconds within which a service has to answer, but for what `reap` removes."""
FREEZE_PATIENCE = 1.5
# How long one sweep may take, while mutations wait; the number of records in it follows from what the last ones took.
SWEEP_SECONDS = 0.03
BATCH_FIRST, BATCH_MIN, BATCH_MAX = 250, 100, 20000
# So much of keys fits into one message.
SWEEP_BYTES = 512 << 10
DEAD_TOLD = 1000

Call = Callable[[Collectable], Coroutine[Any, Any, Any]]

# In this order: an image refers to content, a config's blob to snapshots.
SWEPT: Mapping[str, tuple[str, ...]] = {"image": (IMAGES,), "content": (CONTENT, INGESTS), "snapshot": (SNAPSHOTS,)}


class Collector:
    """Collects in the services given, by name; `lease` is this one's own."""

    def __init__(self, parts: Mapping[str, Collectable], clock: Callable[[], float] = time.time) -> None:
        self._parts = parts
        self._clock = clock
        self._unreaped = set(parts)  # what an earlier process swept, nobody knows

    async def activity(self) -> tuple[bool, int]:
        """Whether anything was deleted since the last collection, and a number that grows with every event."""
        found = await together(self._parts, lambda part: part.activity(), PATIENCE)
        return any(a.deletions for a in found), sum(a.changes for a in found)

    async def collect(self, *, dry_run: bool = False) -> tuple[Collected, float]:
        """Collect once; answers what was done, and when the first of what lives now expires (unix time, 0: never).

        Unavailable, or what a service raised: nothing more was removed.
        """
        run = _Run(self._parts, secrets.token_hex(8), Graph(self._clock()))
        started = time.monotonic()
        try:
            collected = await run.collect(dry_run=dry_run)
        finally:
            self._unreaped |= run.swept_in
            await run.end()
        if not dry_run:
            await self._reap()
        collected = collected.model_copy(update={"seconds": time.monotonic() - started})
        return collected, run.graph.expires

    async def _reap(self) -> None:
        await together({name: self._parts[name] for name in self._unreaped}, lambda part: part.reap(), EPOCH_SECONDS)
        self._unreaped.clear()


class _Run:
    """One epoch."""

    def __init__(self, parts: Mapping[str, Collectable], epoch: str, graph: Graph) -> None:
        self.graph = graph
        self._parts = parts
        self._epoch = epoch
        self._seen = dict.fromkeys(parts, 0)
        self._adding = asyncio.Lock()  # pages come side by side, and the graph takes one at a time
        self._swept: list[int] = []
        self.swept_in: set[str] = set()
        self._waits = [0.0]

    async def collect(self, *, dry_run: bool) -> Collected:
        await self._all(lambda part: part.begin(self._epoch, EPOCH_SECONDS))
        await together(self._parts, self._read, EPOCH_SECONDS)
        components = await asyncio.to_thread(self._marked)
        dead = [number for component in components for number in component]
        kept = len(self.graph) - len(dead)
        if dry_run:
            return Collected(removed=self.graph.count(dead), kept=kept, dead=[*map(self._told, dead[:DEAD_TOLD])])
        await self._sweep(components)
        return Collected(
            removed=self.graph.count(self._swept), kept=kept + len(dead) - len(self._swept),
            longest_wait=max(self._waits),
        )  # fmt: skip

    async def end(self) -> None:
        """Let go of every service that answers; the others' epochs and freezes lapse."""
        try:
            await self._let_go(lambda part: part.end(self._epoch), PATIENCE)
        except WherryError as e:
            log.info("an epoch is left to lapse: %s", e)

    async def _let_go(self, call: Call, patience: float) -> None:
        """The lease service last, and not at all unless all others did: one that did not answer may still be at a
        sweep, and as long as nothing can be leased, nobody is told that something is his that goes."""
        own = {"lease": self._parts["lease"]}
        for parts in ({name: part for name, part in self._parts.items() if name not in own}, own):
            await together(parts, call, patience)

    # ---- the mark

    async def _read(self, part: Collectable) -> None:
        """All records of one service."""
        after, more = b"", True
        while more:
            with context.use(timeout=PATIENCE):
                page = await part.nodes(after)
            async with self._adding:
                after = await asyncio.to_thread(self.graph.add, page)
            more = bool(after)

    def _marked(self) -> list[list[int]]:
        self.graph.mark()
        return self.graph.dead()

    def _told(self, number: int) -> Dead:
        type, namespace, key = self.graph.place(number)
        return Dead(namespace=namespace, resource=Resource(type=type, id=key))

    # ---- the sweeps

    async def _sweep(self, components: list[list[int]]) -> None:
        """Batch by batch, each in a freeze of its own, so that the longest wait depends on no number of the dead."""
        size, first = BATCH_FIRST, 0
        while first < len(components):
            await self._revive()  # most of what changed, while nobody waits for it
            if not self._batch(components, first, 1)[0]:
                return
            async with self._freeze() as frozen:
                await self._revive()
                batch, first = self._batch(components, first, size)
                began = time.monotonic()
                await self._remove(batch)
                size = _next_size(len(batch), time.monotonic() - began)
            log.debug("%d records removed in a freeze of %.3f s", len(batch), frozen.seconds)

    @asynccontextmanager
    async def _freeze(self) -> AsyncIterator[_Frozen]:
        """Mutations wait, everywhere."""
        frozen = _Frozen()
        try:
            await self._all(lambda part: part.freeze(self._epoch, FREEZE_SECONDS), FREEZE_PATIENCE)
            yield frozen
        finally:
            await self._let_go(lambda part: part.thaw(self._epoch), FREEZE_PATIENCE)
            frozen.seconds = time.monotonic() - frozen.began
            self._waits.append(frozen.seconds)

    async def _revive(self) -> None:
        """Take out of the dead what changes since the cut made alive."""
        await asyncio.gather(*map(self._revive_by, self._parts))

    async def _revive_by(self, name: str) -> None:
        more = True
        while more:
            with context.use(timeout=FREEZE_PATIENCE):
                page = await self._parts[name].changed(self._epoch, self._seen[name])
            # Small as a rule; a thread that waits for its turn would take longer.
            self._seen[name], more = self.graph.revive(page)

    def _batch(self, components: list[list[int]], first: int, size: int) -> tuple[list[int], int]:
        """What is still dead of the next components, about `size` of them, and where the one after begins."""
        batch: list[int] = []
        while first < len(components) and len(batch) < size:
            batch += filter(self.graph.is_dead, components[first])
            first += 1
        return batch, first

    async def _remove(self, batch: Iterable[int]) -> None:
        """One service after the other: what refers goes first."""
        places = [(number, *self.graph.place(number)) for number in batch]
        for name, types in SWEPT.items():
            own = [place for place in places if place[1].startswith(types)]
            for numbers, dead in _documents(own):
                self.swept_in.add(name)
                with context.use(timeout=FREEZE_PATIENCE):
                    await self._parts[name].sweep(self._epoch, dead)
                self._swept += numbers

    async def _all(self, call: Call, patience: float = PATIENCE) -> None:
        await together(self._parts, call, patience)


class _Frozen:
    """How long a freeze was."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds = 0.0


def _next_size(removed: int, seconds: float) -> int:
    """How many records a sweep takes in its time, as far as the last one tells."""
    fitting = int(removed * SWEEP_SECONDS / max(seconds, 1e-3))
    return max(min(fitting, 2 * removed, BATCH_MAX), BATCH_MIN)


async def together(parts: Mapping[str, Collectable], call: Call, patience: float) -> list[Any]:
    """The same call at all of them. Unavailable names those that failed, when all have answered or are late."""

    async def one(part: Collectable) -> Any:
        with context.use(timeout=patience):
            return await call(part)

    results = await asyncio.gather(*map(one, parts.values()), return_exceptions=True)
    failed = {name: r for name, r in zip(parts, results, strict=True) if isinstance(r, BaseException)}
    for error in failed.values():
        if not isinstance(error, WherryError):
            raise error
    if failed:
        raise Unavailable("; ".join(f"{name}: {error}" for name, error in failed.items()))
    return results


def _documents(places: list[tuple[int, str, str, str]]) -> list[tuple[list[int], bytes]]:
    """The dead of one service as messages that fit, with their numbers; their order is kept."""
    made: list[tuple[list[int], bytes]] = []
    numbers: list[int] = []
    groups: list[tuple[str, str, list[str]]] = []
    size = 0
    for number, type, namespace, key in [*places, (-1, "", "", "")]:
        if groups and (number < 0 or size > SWEEP_BYTES):
            made.append((numbers, encode_dead(groups)))
            numbers, groups, size = [], [], 0
        if number >= 0:
            if not groups or groups[-1][:2] != (type, namespace):
                groups.append((type, namespace, []))
            groups[-1][2].append(key)
            numbers.append(number)
            size += 4 * len(key) + 16
    return made
