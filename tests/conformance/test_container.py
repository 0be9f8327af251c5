"""What every implementation of Containers must do, through its proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import rebuilt
from rebuilt import told
from wherry_container import metadata
from wherry_container.catalog import Catalog
from wherry_container.service import ContainerService
from wherry_shared import context
from wherry_shared.api.container import Container, Containers, Runtime
from wherry_shared.bus import Bus
from wherry_shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from wherry_shared.outbox import Outbox
from wherry_shared.sqlite import Database, Transaction

SPEC = {"ociVersion": "1.1.0", "process": {"args": ["redis-server"], "cwd": "/"}, "root": {"path": "rootfs"}}
RUNTIME = Runtime(name="io.containerd.runc.v2", options={"SystemdCgroup": True})


def container(id: str = "redis", **changes: Any) -> Container:
    usual: dict[str, Any] = {
        "id": id, "image": "docker.io/library/redis:7", "runtime": RUNTIME, "spec": SPEC, "snapshotter": "overlay",
        "snapshot_key": "redis-rw",
    }  # fmt: skip
    return Container(**{**usual, **changes})


class House(rebuilt.House):
    """A container service on a bus, that can be stopped and built again on the same database."""

    async def start(self) -> None:
        self.database = await Database.open(self.root / "container.db", metadata.MIGRATIONS)
        self.outbox = Outbox(self.database, self.bus)
        self.outbox.start()
        await self.bus.serve(ContainerService(Catalog(metadata.table(self.database))))

    async def stop(self) -> None:
        await self.bus.drain()
        await self.outbox.stop()
        await self.database.close()


@pytest.fixture
async def house(bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    async with House(bus, tmp_path) as house:
        yield house


@pytest.fixture
def containers(house: House) -> Containers:
    return house.bus.proxy(Containers, namespace="default")


async def test_what_is_created_can_be_got(containers: Containers) -> None:
    made = await containers.create(
        container(labels={"a": "b", "empty": ""}, extensions={"x.y": {"n": [1, b"\x00", None]}}, sandbox="pod")
    )
    assert made.created_at is not None
    assert made.created_at == made.updated_at
    assert (made.labels, made.sandbox) == ({"a": "b"}, "pod")
    assert (made.spec, made.runtime) == (SPEC, RUNTIME)
    assert made.extensions == {"x.y": {"n": [1, b"\x00", None]}}
    assert await containers.get("redis") == made


async def test_a_container_needs_little(containers: Containers) -> None:
    made = await containers.create(Container(id="bare", runtime=Runtime(name="runc")))
    assert made.spec is None
    assert await containers.get("bare") == made


async def test_an_unknown_container_is_not_found(containers: Containers) -> None:
    for call in (containers.get("nope"), containers.delete("nope"), containers.update(container("nope"))):
        with pytest.raises(NotFound, match="container 'nope': not found"):
            await call


async def test_an_id_is_taken_once_though_asked_for_twice_at_once(containers: Containers) -> None:
    outcomes = await asyncio.gather(
        *(containers.create(container(image=i)) for i in ("one", "two")), return_exceptions=True
    )
    assert sorted(type(o).__name__ for o in outcomes) == ["AlreadyExists", "Container"]
    assert await containers.get("redis") in outcomes
    with pytest.raises(AlreadyExists, match="'redis'"):
        await containers.create(container())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"runtime": Runtime(name="")}, "runtime.name"),
        ({"snapshotter": ""}, "snapshot_key needs a snapshotter"),
        ({"extensions": {"": 1}}, "extension"),
        ({"spec": {"process": {"args": [b"bytes"]}}}, "spec is no JSON"),
        ({"spec": {"x": float("nan")}}, "spec is no JSON"),
        ({"runtime": Runtime(name="runc", options={"x": b""})}, "runtime.options is no JSON"),
    ],
)
async def test_a_bad_container_is_refused(containers: Containers, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        await containers.create(container(**change))
    assert (await containers.walk()).items == []


@pytest.mark.parametrize("id", ["", "a/b", "-a", "a..b", "x" * 77, "a b", "é"])
async def test_an_id_is_an_identifier(containers: Containers, id: str) -> None:
    with pytest.raises(InvalidArgument, match="id"):
        await containers.get(id)
    with pytest.raises((InvalidArgument, ValueError)):
        await containers.create(container(id))


async def test_without_a_mask_what_can_change_is_replaced(containers: Containers) -> None:
    made = await containers.create(container(labels={"a": "1"}, extensions={"x": 1}, sandbox="pod"))
    new = await containers.update(
        container(
            labels={"b": "2", "a": ""},
            extensions={"y": 2},
            image="other",
            snapshot_key="",
            spec=None,
            sandbox="x",
            runtime=Runtime(name=RUNTIME.name, options={"changed": True}),
        )
    )
    assert (new.labels, new.extensions, new.image, new.snapshot_key, new.spec) == (
        {"b": "2"},
        {"y": 2},
        "other",
        "",
        None,
    )
    assert (new.runtime, new.snapshotter, new.sandbox, new.created_at) == (RUNTIME, "overlay", "pod", made.created_at)
    assert new.updated_at is not None
    assert made.updated_at is not None
    assert new.updated_at > made.updated_at
    assert await containers.get("redis") == new


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"snapshotter": "native"}, "snapshotter is immutable"), ({"runtime": Runtime(name="crun")}, "runtime.name")],
)
async def test_snapshotter_and_runtime_stay(containers: Containers, change: dict[str, Any], reason: str) -> None:
    made = await containers.create(container())
    with pytest.raises(InvalidArgument, match=reason):
        await containers.update(container(**change))
    assert await containers.get("redis") == made
    await containers.update(container(**change), ["image"])
    kept = await containers.get("redis")
    assert (kept.snapshotter, kept.runtime) == ("overlay", RUNTIME)


async def test_a_mask_changes_what_it_names(containers: Containers) -> None:
    made = await containers.create(container(labels={"a.b/c": "1", "d": "2"}, extensions={"x.y": 1, "z": 2}))
    new = container(labels={"a.b/c": "9", "e": "7"}, extensions={"x.y": 8}, image="other", snapshot_key="k2", spec={})
    assert (await containers.update(new, ["labels.a.b/c"])).labels == {"a.b/c": "9", "d": "2"}
    assert (await containers.update(new, ["labels.d"])).labels == {"a.b/c": "9"}
    assert (await containers.update(new, ["extensions.x.y"])).extensions == {"x.y": 8, "z": 2}
    assert (await containers.update(new, ["extensions.z"])).extensions == {"x.y": 8}
    now = await containers.update(new, ["image"])
    assert (now.image, now.snapshot_key, now.spec) == ("other", made.snapshot_key, SPEC)
    now = await containers.update(new, ["snapshot_key", "spec", "labels", "extensions"])
    assert (now.snapshot_key, now.spec, now.labels, now.extensions) == ("k2", {}, new.labels, new.extensions)


async def test_what_a_tenant_says_by_another_type_is_its_word_too(house: House, containers: Containers) -> None:
    """To Python 1 is true; crun passes over it, and the process may get new privileges."""
    catalog = Catalog(metadata.table(house.database))
    await catalog.create("default", container(spec={"process": {"noNewPrivileges": True}}))
    for value, tenant in ((True, ""), (1, "tenant-default")):
        changed = container(spec={"process": {"noNewPrivileges": value}})
        await catalog.update("default", changed, ["spec"], "tenant-default")
        assert (await containers.get("redis")).tenant == tenant


@pytest.mark.parametrize("path", ["id", "runtime", "snapshotter", "snapshotkey", "labels.", "extensions.", "spec.root"])
async def test_an_unknown_path_is_refused(containers: Containers, path: str) -> None:
    made = await containers.create(container())
    with pytest.raises(InvalidArgument, match=f"path '{path}'"):
        await containers.update(container(image="other"), ["image", path])
    assert await containers.get("redis") == made


async def test_an_update_cannot_break_a_rule(containers: Containers) -> None:
    made = await containers.create(container(snapshotter="", snapshot_key=""))
    with pytest.raises(InvalidArgument, match="needs a snapshotter"):
        await containers.update(container(), ["snapshot_key"])
    with pytest.raises(InvalidArgument, match="extension"):
        await containers.update(container(extensions={"": 1}), ["extensions"])
    assert await containers.get("redis") == made


async def test_deleting(containers: Containers) -> None:
    await containers.create(container())
    await containers.delete("redis")
    with pytest.raises(NotFound):
        await containers.get("redis")
    await containers.create(container())


async def test_namespaces_do_not_see_each_other(house: House, containers: Containers) -> None:
    other = house.bus.proxy(Containers, namespace="other")
    made = await containers.create(container())
    with pytest.raises(NotFound):
        await other.get("redis")
    await other.create(container(image="x"))
    await other.delete("redis")
    assert await containers.get("redis") == made
    assert (await other.walk()).items == []
    with pytest.raises(FailedPrecondition, match="namespace is required"):
        await house.bus.proxy(Containers).get("redis")


async def test_a_walk_has_pages_and_stays_under_a_message(containers: Containers) -> None:
    big = {**SPEC, "annotations": {f"k{i}": "v" * 1000 for i in range(60)}}
    ids = [f"c{n:02}" for n in range(20)]
    await asyncio.gather(*(containers.create(container(id, spec=big)) for id in ids))
    assert [c.id for c in (await containers.walk(after="c03", limit=3)).items] == ["c04", "c05", "c06"]
    assert (await containers.walk(limit=3)).next == "c02"
    seen: list[str] = []
    after, pages = "", 0
    while pages == 0 or after:
        page = await containers.walk(after=after)
        seen += [c.id for c in page.items]
        after, pages = page.next, pages + 1
    assert (seen, pages > 1) == (ids, True)
    bare = await containers.walk(['id~="^c1"'], spec=False)
    assert ([c.id for c in bare.items], bare.next) == (ids[10:], "")
    assert [c.model_copy(update={"spec": big}) for c in bare.items] == [await containers.get(id) for id in ids[10:]]


async def test_a_walk_filters(containers: Containers) -> None:
    await containers.create(container("one", labels={"tier": "web", "a.b/c": "x"}))
    await containers.create(container("two", runtime=Runtime(name="crun"), image=""))

    async def ids(*filters: str) -> list[str]:
        return [c.id for c in (await containers.walk(list(filters))).items]

    assert await ids("id==one") == ["one"]
    assert await ids("runtime.name==crun") == ["two"]
    assert await ids("image") == ["one"]
    assert await ids('labels."a.b/c"==x', "id~=^t") == ["one", "two"]
    assert await ids("labels.tier==web,id==two") == []
    with pytest.raises(InvalidArgument, match="position"):
        await ids("id==")


async def test_ten_thousand_are_walked_while_others_are_served(house: House, containers: Containers) -> None:
    """Each once and in order, though some come and go meanwhile; and whoever asks for one is answered in between."""
    ids = [f"c{n:05}" for n in range(10_000)]
    table = metadata.table(house.database)

    def fill(tx: Transaction) -> None:
        for id in ids:
            table.insert(tx, "default", container(id, spec={"ociVersion": "1.0.2", "annotations": {"x": "y" * 100}}))

    await house.database.mutate(fill)
    seen: list[str] = []
    served = 0
    done = asyncio.Event()

    async def others() -> None:
        nonlocal served
        while not done.is_set():
            await containers.get("c05000")
            served += 1

    asking = asyncio.create_task(others())
    after, between = "", []
    while True:
        before = served
        page = await containers.walk(after=after)
        between.append(served - before)
        await containers.create(container("zz"))
        await containers.delete("zz")
        seen += [c.id for c in page.items if c.id != "zz"]
        after = page.next
        if not after:
            break
    done.set()
    await asking
    assert seen == ids
    assert sum(1 for count in between if count) > len(between) // 2, between
    assert len((await containers.walk(["id==c09999"])).items) == 1


async def test_a_record_that_cannot_travel_is_refused(containers: Containers) -> None:
    with pytest.raises(ResourceExhausted, match="'redis' takes"):
        await containers.create(container(extensions={"big": "x" * (800 << 10)}))
    made = await containers.create(container())
    with pytest.raises(ResourceExhausted):
        await containers.update(container(spec={"big": "x" * (800 << 10)}), ["spec"])
    assert await containers.get("redis") == made


async def test_a_snapshot_key_needs_a_snapshotter_but_not_the_other_way_round(containers: Containers) -> None:
    assert (await containers.create(container(snapshot_key=""))).snapshotter == "overlay"


async def test_the_events_come_in_order_and_in_their_namespace(house: House, containers: Containers) -> None:
    async with await house.bus.subscribe() as events:
        made = await containers.create(container(labels={"a": "b"}))
        with pytest.raises(AlreadyExists):
            await containers.create(container())
        await containers.update(container(image="new", labels={"a": "c"}), ["image", "labels.a"])
        await house.bus.proxy(Containers, namespace="other").create(Container(id="x", runtime=Runtime(name="runc")))
        await containers.delete("redis")
        runtime = {"name": RUNTIME.name, "options": {"SystemdCgroup": True}}
        update = {"id": "redis", "image": "new", "labels": {"a": "c"}, "snapshot_key": "redis-rw"}
        assert await told(events, 4) == [
            ("default", "/containers/create", {"id": "redis", "image": made.image, "runtime": runtime}),
            ("default", "/containers/update", update),
            ("other", "/containers/create", {"id": "x", "image": "", "runtime": {"name": "runc", "options": {}}}),
            ("default", "/containers/delete", {"id": "redis"}),
        ]


async def test_all_is_there_after_a_restart_and_a_key_is_one_effect(house: House, containers: Containers) -> None:
    async with await house.bus.subscribe() as events:
        with context.use(key="k1"):
            made = await containers.create(container())
        with context.use(key="k2"):
            changed = await containers.update(container(image="new"), ["image"])
        await house.restart()
        assert await containers.get("redis") == changed
        with context.use(key="k1"):
            assert await containers.create(container()) == made
        with context.use(key="k2"):
            assert await containers.update(container(image="new"), ["image"]) == changed
        assert (await containers.walk()).items == [changed]
        await containers.delete("redis")
        topics = [topic for _, topic, _ in await told(events, 3)]
        assert topics == ["/containers/create", "/containers/update", "/containers/delete"]
