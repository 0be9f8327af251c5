"""What every implementation of Namespaces must do, through its proxy.

Images and containers are the real services; of content and snapshots only the question that is asked is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import rebuilt
from rebuilt import event_stream, told
from wherry_container import metadata as container_metadata
from wherry_container.catalog import Catalog as ContainerCatalog
from wherry_container.service import ContainerService
from wherry_events import metadata as event_metadata
from wherry_events.journal import Journal
from wherry_events.kept import Kept
from wherry_events.metadata import Rows
from wherry_events.service import EventsService
from wherry_image import metadata as image_metadata
from wherry_image.catalog import Catalog as ImageCatalog
from wherry_image.service import ImageService
from wherry_namespace import metadata
from wherry_namespace.missed import Missed
from wherry_namespace.probes import Probes
from wherry_namespace.registry import Registry
from wherry_namespace.service import NamespaceService
from wherry_namespace.watcher import Watcher
from wherry_shared import context
from wherry_shared.api.container import Container, Containers, Runtime
from wherry_shared.api.content import Content
from wherry_shared.api.content import Info as Blob
from wherry_shared.api.events import Events
from wherry_shared.api.gc import Collections
from wherry_shared.api.image import Image, Images
from wherry_shared.api.lease import Leases
from wherry_shared.api.namespace import Namespace, Namespaces
from wherry_shared.api.snapshot import Info as Snapshot
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.bus import Bus
from wherry_shared.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unimplemented,
)
from wherry_shared.outbox import Outbox
from wherry_shared.sqlite import Database
from wherry_shared.values import Descriptor, Page

TIME = datetime.now(UTC)
IMAGE = Image(name="redis", target=Descriptor(media_type="m", digest=f"sha256:{'a' * 64}", size=1))
CONTAINER = Container(id="redis", runtime=Runtime(name="runc"))


def partial_service(contract: type[Any], **known: Callable[..., Any]) -> Any:
    """A service that can only do what is given."""

    async def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Unimplemented("that is not here")

    methods = {**dict.fromkeys(contract.endpoints, refuse), **{n: staticmethod(f) for n, f in known.items()}}
    return type(f"Partial{contract.__name__}", (contract,), methods)()


class House(rebuilt.House):
    """The namespace service with all that it asks, that can be built again on the same databases."""

    def __init__(self, bus: Bus, root: Path) -> None:
        super().__init__(bus, root)
        self.blobs: set[str] = set()
        self.snapshots: set[tuple[str, str]] = set()
        self.without: set[str] = set()
        self.patience = 10.0  # a loaded machine's

    async def start(self) -> None:
        names = {
            "namespace": metadata, "image": image_metadata, "container": container_metadata, "events": event_metadata,
        }  # fmt: skip
        self.stream = await event_stream(self.bus)
        self.databases = {n: await Database.open(self.root / f"{n}.db", m.MIGRATIONS) for n, m in names.items()}
        self.outboxes = [Outbox(database, self.bus) for name, database in self.databases.items() if name != "events"]
        for outbox in self.outboxes:
            outbox.start()
        self.registry = Registry(metadata.table(self.databases["namespace"]), Probes(self.bus, patience=self.patience))
        missed = Missed(self.registry, self.databases["namespace"], self.bus.proxy(Events))
        self.watcher = Watcher(self.registry, self.bus, missed)
        await self.watcher.start()
        services = {
            "events": EventsService(Journal(self.stream, self.bus, Kept(Rows(self.databases["events"])))),
            "namespace": NamespaceService(self.registry),
            "image": ImageService(
                ImageCatalog(image_metadata.table(self.databases["image"])),
                self.bus.proxy(Leases),
                self.bus.proxy(Collections),
            ),
            "container": ContainerService(ContainerCatalog(container_metadata.table(self.databases["container"]))),
            "content": partial_service(Content, walk=self._walk_blobs),
            "snapshot": partial_service(Snapshots, walk=self._walk_snapshots, snapshotters=self._snapshotters),
        }
        for name, service in services.items():
            if name not in self.without:
                await self.bus.serve(service)

    async def _walk_blobs(self, **arguments: Any) -> Page[Blob]:
        blob = Blob(digest=f"sha256:{'a' * 64}", size=1, created_at=TIME, updated_at=TIME)
        return Page[Blob](items=[blob] if context.namespace() in self.blobs else [])

    async def _snapshotters(self) -> list[str]:
        return ["native", "overlay"]

    async def _walk_snapshots(self, snapshotter: str, **arguments: Any) -> Page[Snapshot]:
        if snapshotter not in await self._snapshotters():
            raise InvalidArgument(f"snapshotter {snapshotter!r} is unknown")
        snapshot = Snapshot(kind="active", name="a", created_at=TIME, updated_at=TIME)
        return Page[Snapshot](items=[snapshot] if (context.namespace(), snapshotter) in self.snapshots else [])

    async def stop(self) -> None:
        await self.bus.drain()
        await self.watcher.stop()
        for outbox in self.outboxes:
            await outbox.stop()
        for database in self.databases.values():
            await database.close()

    async def restart(self, *, without: str = "") -> None:
        await self.stop()
        self.without = {without}
        await self.start()


@pytest.fixture
async def house(bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    async with House(bus, tmp_path) as house:
        yield house


@pytest.fixture
def namespaces(house: House) -> Namespaces:
    return house.bus.proxy(Namespaces)


async def names(namespaces: Namespaces, *filters: str) -> list[str]:
    return [n.name for n in (await namespaces.walk(list(filters))).items]


async def test_what_is_created_can_be_got(namespaces: Namespaces) -> None:
    made = await namespaces.create("moby", {"containerd.io/defaults/runtime": "runc", "empty": ""})
    assert made == Namespace(name="moby", labels={"containerd.io/defaults/runtime": "runc"})
    assert await namespaces.get("moby") == made


async def test_an_unknown_namespace_is_answered_with_no_labels(namespaces: Namespaces) -> None:
    assert await namespaces.get("nope") == Namespace(name="nope")
    assert await names(namespaces) == []


async def test_but_it_cannot_be_changed_or_deleted(namespaces: Namespaces) -> None:
    for call in (namespaces.update("nope", {}), namespaces.delete("nope")):
        with pytest.raises(NotFound, match="namespace 'nope': not found"):
            await call


@pytest.mark.parametrize("name", ["version", "_", "", "a/b", "a..b", "x" * 77, "*", "a b"])
async def test_a_bad_name_is_refused(namespaces: Namespaces, name: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        await namespaces.create(name)
    assert await names(namespaces) == []


async def test_a_name_is_taken_once_though_asked_for_twice_at_once(namespaces: Namespaces) -> None:
    outcomes = await asyncio.gather(*(namespaces.create("x", {"n": n}) for n in "12"), return_exceptions=True)
    assert sorted(type(o).__name__ for o in outcomes) == ["AlreadyExists", "Namespace"]
    assert await namespaces.get("x") in outcomes


async def test_labels_change_by_a_mask_or_all_at_once(namespaces: Namespaces) -> None:
    await namespaces.create("x", {"a.b/c": "1", "d": "2"})
    new = {"a.b/c": "9", "e": "7"}
    assert (await namespaces.update("x", new, ["labels.a.b/c"])).labels == {"a.b/c": "9", "d": "2"}
    assert (await namespaces.update("x", new, ["labels.d"])).labels == {"a.b/c": "9"}
    assert (await namespaces.update("x", {"f": "1", "g": ""})).labels == {"f": "1"}
    assert await namespaces.get("x") == Namespace(name="x", labels={"f": "1"})


@pytest.mark.parametrize("path", ["labels", "labels.", "name", ""])
async def test_an_unknown_path_is_refused(namespaces: Namespaces, path: str) -> None:
    made = await namespaces.create("x", {"a": "1"})
    with pytest.raises(InvalidArgument, match=f"path '{path}'"):
        await namespaces.update("x", {"a": "2"}, ["labels.a", path])
    assert await namespaces.get("x") == made


async def test_a_walk_has_pages_and_filters(namespaces: Namespaces) -> None:
    for name in ("c", "a", "b", "d"):
        await namespaces.create(name, {"tier": "x" if name in "ab" else "y", "a.b/c": "z"})
    page = await namespaces.walk(limit=3)
    assert ([n.name for n in page.items], page.next) == (["a", "b", "c"], "c")
    assert await names(namespaces, "labels.tier==x", "name==d") == ["a", "b", "d"]
    assert await names(namespaces, 'labels."a.b/c"==z,name~=^c$') == ["c"]
    with pytest.raises(InvalidArgument, match="position"):
        await namespaces.walk(["name="])


async def test_an_empty_namespace_can_be_deleted(namespaces: Namespaces) -> None:
    await namespaces.create("x", {"a": "1"})
    await namespaces.delete("x")
    assert await names(namespaces) == []
    assert await namespaces.get("x") == Namespace(name="x")
    await namespaces.create("x")


async def test_a_namespace_with_something_in_it_stays(house: House, namespaces: Namespaces) -> None:
    images, containers = house.bus.proxy(Images, namespace="x"), house.bus.proxy(Containers, namespace="x")
    await namespaces.create("x")
    await namespaces.create("y")
    await images.create(IMAGE)
    await containers.create(CONTAINER)
    house.blobs.add("x")
    house.snapshots.add(("x", "native"))
    with pytest.raises(FailedPrecondition, match=r"'x' must be empty.* images, blobs, containers, snapshots$"):
        await namespaces.delete("x")
    await namespaces.delete("y")
    await images.delete("redis")
    house.blobs.clear()
    with pytest.raises(FailedPrecondition, match=r"has containers, snapshots$"):
        await namespaces.delete("x")
    await containers.delete("redis")
    house.snapshots.clear()
    await namespaces.delete("x")
    assert await names(namespaces) == []


@pytest.mark.parametrize("service", ["image", "content", "container", "snapshot"])
async def test_who_does_not_answer_keeps_the_namespace(house: House, namespaces: Namespaces, service: str) -> None:
    await namespaces.create("x")
    for house.patience in (0.5, 5.0, 50.0):  # within which each of the others has to answer
        await house.restart(without=service)
        with pytest.raises(Unavailable) as caught, context.use(timeout=60):
            await namespaces.delete("x")
        if f"the {service} service" in caught.value.message:
            break
    assert f"the {service} service" in caught.value.message
    assert await names(namespaces) == ["x"]


async def test_what_happens_in_it_makes_it_known(house: House, namespaces: Namespaces) -> None:
    images = house.bus.proxy(Images, namespace="used.one")
    async with await house.bus.subscribe() as events:
        await images.create(IMAGE)
        assert await told(events, 2) == [
            ("used.one", "/images/create", {"name": "redis"}),
            ("used.one", "/namespaces/create", {"name": "used.one", "labels": {}}),
        ]
        await images.delete("redis")
        assert [topic for _, topic, _ in await told(events, 1)] == ["/images/delete"]
        await namespaces.create("last")
        assert [(namespace, topic) for namespace, topic, _ in await told(events, 1)] == [("last", "/namespaces/create")]
    assert await names(namespaces) == ["last", "used.one"]
    with pytest.raises(AlreadyExists):
        await namespaces.create("used.one")


async def test_only_what_comes_into_being_makes_it_known(house: House, namespaces: Namespaces) -> None:
    """As in containerd; and of all the other events, which are many, the service does not even hear."""
    images = house.bus.proxy(Images, namespace="deaf")
    await house.watcher.stop()
    async with await house.bus.subscribe(topic="/images/create") as events:
        await images.create(IMAGE)
        await told(events, 1)
    house.watcher = Watcher(house.registry, house.bus, Nothing())
    await house.watcher.start()
    await images.delete("redis")
    async with await house.bus.subscribe(topic="/namespaces/create") as events:
        await house.bus.proxy(Containers, namespace="hears").create(CONTAINER)
        assert [namespace for namespace, _, _ in await told(events, 1)] == ["hears"]
        assert await names(namespaces) == ["hears"]
        await images.create(IMAGE)
        assert [namespace for namespace, _, _ in await told(events, 1)] == ["deaf"]


class Nothing(Missed):
    """Nothing was missed."""

    def __init__(self) -> None:
        pass

    async def look(self) -> None:
        pass


async def test_what_came_into_being_while_it_was_away(house: House, namespaces: Namespaces) -> None:
    for name in ("kept", "gone", "again", "known"):
        await namespaces.create(name)
    await house.watcher.stop()
    async with await house.bus.subscribe(topic="/namespaces/delete") as events:
        for name in ("gone", "again", "missed"):
            images = house.bus.proxy(Images, namespace=name)
            await images.create(IMAGE)
            await images.delete("redis")
        for name in ("gone", "again"):
            await namespaces.delete(name)
        await told(events, 2)
    await house.bus.proxy(Images, namespace="again").create(IMAGE)
    await house.restart()
    async with await house.bus.subscribe(topic="/namespaces/create") as events:
        while "missed" not in (found := await names(namespaces)) or "again" not in found:
            await anext(events)
    assert await names(namespaces) == ["again", "kept", "known", "missed"]


async def test_and_while_it_was_cut_off(house: House, namespaces: Namespaces) -> None:
    for subscription in house.watcher._subscriptions:
        await subscription.unsubscribe()
    await house.bus.proxy(Images, namespace="missed").create(IMAGE)
    async with await house.bus.subscribe(topic="/namespaces/create") as events:
        for listener in list(house.bus.transport.on_state):
            listener(True)
        assert [namespace for namespace, _, _ in await told(events, 1)] == ["missed"]


async def test_a_known_namespace_keeps_its_labels_when_used(house: House, namespaces: Namespaces) -> None:
    made = await namespaces.create("x", {"a": "1"})
    await house.restart()
    async with await house.bus.subscribe() as events:
        await house.bus.proxy(Images, namespace="x").create(IMAGE)
        assert [topic for _, topic, _ in await told(events, 1)] == ["/images/create"]
        await namespaces.create("last")
        assert [(namespace, topic) for namespace, topic, _ in await told(events, 1)] == [("last", "/namespaces/create")]
    assert await namespaces.get("x") == made


async def test_an_event_from_before_its_deletion_does_not_revive_it(house: House, namespaces: Namespaces) -> None:
    await namespaces.create("x")
    before = datetime.now(UTC)
    await namespaces.delete("x")
    await house.registry.seen("x", before)
    assert await names(namespaces) == []
    await house.registry.seen("version", before + timedelta(days=1))
    assert await names(namespaces) == []
    await house.registry.seen("x", datetime.now(UTC))
    assert await names(namespaces) == ["x"]


async def test_the_events_come_in_order_and_in_the_namespace_itself(house: House, namespaces: Namespaces) -> None:
    async with await house.bus.subscribe() as events:
        await namespaces.create("x", {"a": "1"})
        with pytest.raises(AlreadyExists):
            await namespaces.create("x")
        await namespaces.update("x", {"b": "2"}, ["labels.b"])
        await namespaces.delete("x")
        await namespaces.create("y")
        assert await told(events, 4) == [
            ("x", "/namespaces/create", {"name": "x", "labels": {"a": "1"}}),
            ("x", "/namespaces/update", {"name": "x", "labels": {"a": "1", "b": "2"}}),
            ("x", "/namespaces/delete", {"name": "x"}),
            ("y", "/namespaces/create", {"name": "y", "labels": {}}),
        ]
    assert await names(namespaces) == ["y"]


async def test_all_is_there_after_a_restart_and_a_key_is_one_effect(house: House, namespaces: Namespaces) -> None:
    with context.use(key="k1"):
        made = await namespaces.create("x", {"a": "1"})
    with context.use(key="k2"):
        changed = await namespaces.update("x", {"a": "2"})
    await namespaces.create("y")
    with context.use(key="k3"):
        await namespaces.delete("y")
    await house.restart()
    assert await namespaces.get("x") == changed
    with context.use(key="k1"):
        assert await namespaces.create("x", {"a": "1"}) == made
    with context.use(key="k2"):
        assert await namespaces.update("x", {"a": "2"}) == changed
    house.blobs.add("y")
    with context.use(key="k3"):
        await namespaces.delete("y")
    assert await names(namespaces) == ["x"]
