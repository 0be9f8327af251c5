"""Random histories of pull, run, delete, label, expire and collect, with crashes in between, against a model.

The services are the real ones, on a bus in memory. The model knows what was made and what was answered, and walks its
own graph: nothing that lives in it may be missing, and after a quiet collection nothing else may be there.

A history may put work between any two calls of a collection, and may kill a service, or the collection itself, before
or after any of them.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from collecting import BUILDS, CONFIG, SNAPSHOTTER, House, digest_of, gc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wherry_lease.collector import Collector
from wherry_lease.metadata import LeaseRecords
from wherry_shared import context
from wherry_shared.api.container import Container, Runtime
from wherry_shared.api.gc import (
    Collectable,
    ContainerCollection,
    ContentCollection,
    ImageCollection,
    SnapshotCollection,
)
from wherry_shared.api.image import Image
from wherry_shared.bus import Bus
from wherry_shared.collectable import Collection
from wherry_shared.errors import AlreadyExists, NotFound, WherryError
from wherry_shared.memory import MemoryTransport
from wherry_shared.sqlite import Database
from wherry_shared.values import Descriptor, now

NAMES = 3
EXAMPLES = 80
Node = tuple[str, str]


@dataclass
class Model:
    """What there is, and what refers to what: the rules, told once more."""

    there: set[Node] = field(default_factory=set)
    roots: set[Node] = field(default_factory=set)
    edges: dict[Node, set[Node]] = field(default_factory=dict)
    leases: dict[str, set[Node]] = field(default_factory=dict)

    def alive(self) -> set[Node]:
        found: set[Node] = set()
        ways = [*self.roots, *(node for nodes in self.leases.values() for node in nodes)]
        while ways:
            node = ways.pop()
            if node in self.there and node not in found:
                found.add(node)
                ways += self.edges.get(node, ())
        return found

    def add(self, node: Node, *edges: Node) -> None:
        self.there.add(node)
        self.edges[node] = set(edges)

    def forget(self, node: Node) -> None:
        self.there.discard(node)
        self.roots.discard(node)
        self.edges.pop(node, None)
        for nodes in self.leases.values():
            nodes.discard(node)


class Interrupted(Exception):
    """The collection is killed here."""


class Faulty:
    """A part of the collection, as the collector sees it; `at` decides before and after each call what happens."""

    def __init__(self, part: Any, at: Callable[[], Awaitable[None]]) -> None:
        self._part, self._at = part, at

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._part, name)

        async def call(*args: Any) -> Any:
            await self._at()
            value = await method(*args)
            await self._at()
            return value

        return call


@dataclass(frozen=True)
class Plan:
    """What happens while a collection runs: actions by the number of the step that they come before."""

    actions: dict[int, str]


class World:
    """The services, the model, and the actions on both."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = Model()
        self.pending: set[asyncio.Task[None]] = set()
        self.serial = 0
        self.killing, self.acting = asyncio.Lock(), asyncio.Lock()

    async def __aenter__(self) -> World:
        self.house = await House(Bus(MemoryTransport(), node="n1"), self.root).__aenter__()
        self.client = self.house.of("default")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.house.__aexit__()

    # ---- actions. Each uses the services as a careful client does: what it relies on is leased or referred to.

    async def pull(self, n: int) -> None:
        """Two blobs that share a layer with the neighbour, a snapshot and an image, under a lease."""
        self.serial += 1
        lease = f"pull-{self.serial}"
        await self.client.leases.create(lease)
        held = self.model.leases[lease] = set()
        layer, config, manifest = (("blob", f"{kind}{m}") for kind, m in (("l", n // 2), ("c", n), ("m", n)))
        chain = ("snapshot", f"chain{n // 2}")
        with context.use(lease=lease):
            await self._blob(layer, held)
            await self._snapshot(chain, held)
            await self._blob(config, held, chain)
            await self._blob(manifest, held, layer, config)
            target = Descriptor(media_type=CONFIG, digest=digest_of(manifest[1]), size=2)
            image = Image(name=f"i{n}", target=target)
            try:
                await self.client.images.create(image)
            except AlreadyExists:
                with suppress(NotFound):
                    await self.client.images.update(image)
        self.model.add(("image", f"i{n}"), manifest)
        self.model.roots.add(("image", f"i{n}"))
        await self.client.leases.delete(lease)
        del self.model.leases[lease]

    async def _blob(self, node: Node, held: set[Node], *refs: Node) -> None:
        """Upload, or be told that it is there: from then on it must stay, as long as the lease does."""
        labels = {
            (f"ref_content_{i}" if kind == "blob" else f"ref_snapshot_{SNAPSHOTTER}"):
            digest_of(name) if kind == "blob" else name
            for i, (kind, name) in enumerate(refs)
        }  # fmt: skip
        digest = digest_of(node[1])
        try:
            await self.client.content.put(node[1].encode(), digest, gc(labels))
            self.model.add(node, *refs)
            held.add(node)
        except AlreadyExists:
            held.add(node)
            self.model.there.add(node)
            if labels:
                await self.client.content.update(digest, gc(labels), [f"labels.{label}" for label in gc(labels)])
            self.model.edges[node] = set(refs)

    async def _snapshot(self, node: Node, held: set[Node]) -> None:
        self.serial += 1
        key = f"extract-{self.serial}"
        await self.client.snapshots.prepare(SNAPSHOTTER, key)
        held.add(("snapshot", key))
        self.model.add(("snapshot", key))
        try:
            await self.client.snapshots.commit(SNAPSHOTTER, node[1], key)
            self.model.forget(("snapshot", key))
            self.model.add(node)
        except AlreadyExists:
            self.model.there.add(node)
            self.model.edges.setdefault(node, set())
            held.add(node)
            await self.client.snapshots.remove(SNAPSHOTTER, key)
            self.model.forget(("snapshot", key))
        held.add(node)

    async def run(self, n: int) -> None:
        """A container on an image's snapshot, which is leased first."""
        self.serial += 1
        lease, key = f"run-{self.serial}", f"rw-{self.serial}"
        await self.client.leases.create(lease)
        held = self.model.leases[lease] = set()
        parent = ("snapshot", f"chain{n // 2}")
        with context.use(lease=lease):
            try:
                await self.client.snapshots.prepare(SNAPSHOTTER, key, parent[1])
            except NotFound:
                pass
            else:
                self.model.there.add(parent)
                self.model.add(("snapshot", key), parent)
                held.add(("snapshot", key))
                record = Container(
                    id=f"c{self.serial}", runtime=Runtime(name="runc"), snapshotter=SNAPSHOTTER, snapshot_key=key
                )
                await self.client.containers.create(record)
                self.model.add(("container", record.id), ("snapshot", key))
                self.model.roots.add(("container", record.id))
        await self.client.leases.delete(lease)
        del self.model.leases[lease]

    async def remove_image(self, n: int) -> None:
        self.model.forget(("image", f"i{n}"))
        with suppress(NotFound):
            await self.client.images.delete(f"i{n}")

    async def expire_image(self, n: int) -> None:
        """From now on it is no root; whether it went meanwhile, the answer tells."""
        node = ("image", f"i{n}")
        labels = gc({"expire": "2001-01-01T00:00:00Z"})
        self.model.roots.discard(node)
        with suppress(NotFound):
            image = await self.client.images.get(node[1])
            await self.client.images.update(image.model_copy(update={"labels": labels}), ["labels"])

    async def stop_container(self, n: int) -> None:
        containers = sorted(name for kind, name in self.model.there if kind == "container")
        if containers:
            name = containers[n % len(containers)]
            self.model.forget(("container", name))
            await self.client.containers.delete(name)

    async def root_blob(self, n: int) -> None:
        """A label makes a blob a root, or takes that back."""
        node = ("blob", f"c{n}")
        with suppress(NotFound):
            info = await self.client.content.info(digest_of(node[1]))
            label = "containerd.io/gc.root"
            value = "" if label in info.labels else "x"
            if not value:
                self.model.roots.discard(node)
            await self.client.content.update(digest_of(node[1]), {label: value}, [f"labels.{label}"])
            if value:
                self.model.there.add(node)
                self.model.roots.add(node)

    async def hold(self, n: int) -> None:
        """A lease of its own on what is there, for good or until `let_go`."""
        lease = f"hold-{n}"
        node = ("blob", f"m{n}")
        with suppress(AlreadyExists):
            await self.client.leases.create(lease)
        held = self.model.leases.setdefault(lease, set())
        with context.use(lease=lease):
            try:
                await self.client.content.open(f"held-{n}", expected=digest_of(node[1]))
                await self.client.content.abort(f"held-{n}")
            except AlreadyExists:
                self.model.there.add(node)
                held.add(node)

    async def let_go(self, n: int) -> None:
        self.model.leases.pop(f"hold-{n}", None)
        with suppress(NotFound):
            await self.client.leases.delete(f"hold-{n}")

    async def delete_blob(self, n: int) -> None:
        """One that nobody could be missing."""
        node = ("blob", f"l{n}")
        if node not in self.model.alive() and not self.pending:
            self.model.forget(node)
            with suppress(NotFound):
                await self.client.content.delete(digest_of(node[1]))

    # ---- collections

    async def collect(self, plan: Plan) -> bool:
        """One collection, with what the plan puts between its calls. Whether it was a whole one."""
        step = 0

        async def at() -> None:
            nonlocal step
            step += 1
            action = plan.actions.get(step)
            if action == "interrupt":
                raise Interrupted
            if action is not None and action.startswith("kill "):
                await self.kill(action.removeprefix("kill "))
            elif action is not None:
                self.spawn(action)
                await asyncio.sleep(0.002)

        database = await Database.open(self.root / "root/lease/metadata.db", _lease_migrations())
        try:
            parts: dict[str, Any] = {"lease": Collection(database, [LeaseRecords(now)])}
            for name, contract in _CONTRACTS.items():
                parts[name] = self.house.bus.proxy(contract)
            collector = Collector({name: Faulty(part, at) for name, part in parts.items()})
            try:
                await collector.collect()
                return True
            except (WherryError, Interrupted):
                return False
        finally:
            await database.close()

    async def kill(self, name: str) -> None:
        """It is there again when this returns."""
        async with self.killing:
            await self.house.kill(name)
            await self.house.start(name)

    def spawn(self, action: str) -> None:
        async def act() -> None:
            name, n = action.split()
            work: Coroutine[Any, Any, None] = getattr(self, name)(int(n))
            async with self.acting:  # one after the other, but side by side with the collection
                await work

        self.pending.add(asyncio.create_task(act()))

    async def settle(self) -> None:
        """What was begun is done."""
        while self.pending:
            task = self.pending.pop()
            await task

    async def check(self, *, quiet: bool) -> None:
        there = {_node(name, kind) for name, kind in await self._listed()}
        alive = self.model.alive()
        assert alive <= there, f"gone though alive: {sorted(alive - there)}"
        if quiet:
            assert there == alive, f"there though dead: {sorted(there - alive)}"
        self.model.there &= there
        for digest in (await self.client.content.walk()).items:
            assert len(await self.client.content.read(digest.digest)) == digest.size

    async def _listed(self) -> set[tuple[str, str]]:
        client = self.client
        found = {(i.name, "image") for i in (await client.images.walk()).items}
        found |= {(i.digest, "blob") for i in (await client.content.walk()).items}
        found |= {(i.name, "snapshot") for i in (await client.snapshots.walk(SNAPSHOTTER)).items}
        return found | {(i.id, "container") for i in (await client.containers.walk()).items}


_BLOBS = {digest_of(f"{kind}{n}"): f"{kind}{n}" for kind in "lcm" for n in range(NAMES)}
_CONTRACTS: dict[str, type[Collectable]] = {
    "image": ImageCollection, "container": ContainerCollection, "content": ContentCollection,
    "snapshot": SnapshotCollection,
}  # fmt: skip


def _node(name: str, kind: str) -> Node:
    return (kind, _BLOBS[name] if kind == "blob" else name)


def _lease_migrations() -> Any:
    from wherry_lease import metadata

    return metadata.MIGRATIONS


ACTIONS = (
    "pull", "run", "remove_image", "expire_image", "stop_container", "root_blob", "hold", "let_go", "delete_blob",
)  # fmt: skip
actions = st.builds("{} {}".format, st.sampled_from(ACTIONS), st.integers(0, NAMES - 1))
# Work that may go on while a service is killed under it would have to know what came of it; a client asks again then.
kills = st.builds("kill {}".format, st.sampled_from(sorted(set(BUILDS) - {"lease"})))
# What was alive and is dead, and may come to life again while it is collected.
dying = st.sampled_from(
    (["pull 0", "remove_image 0"], ["pull 0", "pull 1", "remove_image 1", "expire_image 0"], ["pull 0", "run 0",
     "stop_container 1", "remove_image 0"], ["pull 1", "hold 1", "remove_image 1", "let_go 1"])
)  # fmt: skip
steps = st.integers(1, 70)
quietly = st.builds(Plan, st.just({}))
meanwhile = st.builds(Plan, st.dictionaries(steps, actions, min_size=1, max_size=6))
killed = st.builds(Plan, st.dictionaries(steps, kills | st.just("interrupt"), min_size=1, max_size=2))
histories = st.lists(st.lists(actions, max_size=4) | dying | meanwhile | meanwhile | killed | quietly, max_size=8)


@pytest.fixture(autouse=True)
def _hush() -> None:
    logging.getLogger("wherry.snapshot").setLevel(logging.ERROR)


@pytest.mark.timeout(600)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(histories)
def test_what_lives_stays_and_what_is_dead_goes(history: list[list[str] | Plan]) -> None:
    asyncio.run(_live_through(history))


async def _live_through(history: list[list[str] | Plan]) -> None:
    base = Path(tempfile.mkdtemp(prefix="wherry-gc-", dir="/dev/shm"))
    try:
        async with asyncio.timeout(60), World(base) as world:
            for entry in history:
                if isinstance(entry, Plan):
                    whole = await world.collect(entry)
                    busy = bool(world.pending)
                    await world.settle()
                    await world.check(quiet=whole and not busy and not entry.actions)
                else:
                    for action in entry:
                        world.spawn(action)
                        await world.settle()
            assert await world.collect(Plan({}))
            await world.check(quiet=True)
    finally:
        shutil.rmtree(base)
