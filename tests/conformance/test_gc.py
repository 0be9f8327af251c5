"""What a garbage collection keeps and what it removes, rule by rule (containerd's), over the whole of five services."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from collecting import SNAPSHOTTER, Client, House, blobs, digest_of
from wherry_shared import context
from wherry_shared.api.container import Container, Runtime
from wherry_shared.api.lease import EXPIRE_LABEL, Resource
from wherry_shared.bus import Bus
from wherry_shared.errors import AlreadyExists, NotFound, Unavailable

SNAPSHOT_REF = f"ref_snapshot_{SNAPSHOTTER}"
HOUR = timedelta(hours=1)


@pytest.fixture
async def house(bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    async with House(bus, tmp_path) as made:
        yield made


@pytest.fixture
def client(house: House) -> Client:
    return house.of("default")


async def left(house: House, client: Client) -> set[str]:
    """What is there after a collection."""
    await house.collector.collect()
    return await client.there()


def at(delta: timedelta) -> str:
    return (datetime.now(UTC) + delta).isoformat()


# ---- roots


async def test_what_nothing_names_is_garbage_at_once(house: House, client: Client) -> None:
    await client.blob("a")
    await client.snapshot("committed")
    await client.snapshot("active", "committed", commit=False)
    await client.snapshots.view(SNAPSHOTTER, "view", "committed")
    collected = await house.collector.collect()
    assert await client.there() == set()
    assert collected.removed == {"content": 1, f"snapshots/{SNAPSHOTTER}": 3}
    assert collected.kept == 0 and 0 < collected.longest_wait < collected.seconds
    assert list((house.root / "root/content/blobs/sha256").iterdir()) == []
    assert list((house.root / f"root/snapshot/{SNAPSHOTTER}/snapshots").iterdir()) == []


async def test_an_image_keeps_its_target_and_what_that_names(house: House, client: Client) -> None:
    for name in ("config", "layer", "other"):
        await client.blob(name)
    await client.blob("manifest", ref_content_config=digest_of("config"), ref_content_l_0=digest_of("layer"))
    await client.image("redis", "manifest")
    assert await left(house, client) == {"image:redis", *blobs("manifest", "config", "layer")}
    await client.images.delete("redis")
    assert await left(house, client) == set()


async def test_a_container_keeps_its_snapshot_and_its_parents(house: House, client: Client) -> None:
    await client.blob("named")
    await client.snapshot("base", ref_content=digest_of("named"))
    await client.snapshot("top", "base")
    await client.snapshot("rw", "top", commit=False)
    await client.snapshot("beside", "base")
    record = Container(id="c", runtime=Runtime(name="runc"), snapshotter=SNAPSHOTTER, snapshot_key="rw")
    await client.containers.create(record)
    kept = {"snapshot:base", "snapshot:top", "snapshot:rw", *blobs("named")}
    assert await left(house, client) == kept
    await client.containers.delete("c")
    assert await left(house, client) == set()


async def test_a_containers_labels_keep(house: House, client: Client) -> None:
    await client.blob("a")
    labels = {"containerd.io/gc.ref.content.x": digest_of("a")}
    await client.containers.create(Container(id="c", runtime=Runtime(name="runc"), labels=labels))
    assert await left(house, client) == blobs("a")


@pytest.mark.parametrize("label", ["root", "root_x", "rooted"])
async def test_a_label_makes_a_root(house: House, client: Client, label: str) -> None:
    await client.blob("named")
    await client.blob("a", **{label: "now", "ref_content": digest_of("named")})
    await client.snapshot("s", **{label: "now"})
    assert await left(house, client) == {"snapshot:s", *blobs("a", "named")}


async def test_a_lease_keeps_until_it_is_deleted(house: House, client: Client) -> None:
    await client.leases.create("pull")
    await client.blob("named")
    await client.blob("a", lease="pull", ref_content=digest_of("named"))
    await client.snapshot("s", lease="pull")
    await client.snapshot("t", "s", lease="pull", commit=False)
    await client.leases.add_resource("pull", Resource(type="images", id="gone"))
    with context.use(lease="pull"):
        await client.content.open("r")
    everything = {"lease:pull", "snapshot:s", "snapshot:t", "ingest:r", *blobs("a", "named")}
    assert await left(house, client) == everything
    await client.leases.delete("pull")
    assert await left(house, client) == set()


async def test_a_lease_that_expired_keeps_nothing(house: House, client: Client) -> None:
    await client.leases.create("odd", {EXPIRE_LABEL: "tomorrow"})
    await client.blob("b", lease="odd")
    for seconds in (0.5, 5, 50):
        await client.leases.create("old", {EXPIRE_LABEL: at(timedelta(seconds=seconds))})
        try:
            await client.blob("a", lease="old")
        except NotFound:  # the machine took longer than that
            continue
        await asyncio.sleep(seconds)
        break
    assert await left(house, client) == {"lease:odd", *blobs("b")}


async def test_a_flat_lease_keeps_no_more_than_it_lists(house: House, client: Client) -> None:
    await client.leases.create("flat", {"containerd.io/gc.flat": "x"})
    await client.blob("under")
    for name in ("listed", "target", "beside"):
        await client.blob(name, ref_content=digest_of("under"))
    await client.snapshot("base")
    await client.snapshot("top", "base", ref_content=digest_of("under"))
    await client.image("i", "target", expire=at(-HOUR), ref_content_x=digest_of("beside"))
    for type, id in (
        ("content", digest_of("listed")), (f"snapshots/{SNAPSHOTTER}", "top"), ("images", "i"),
    ):  # fmt: skip
        await client.leases.add_resource("flat", Resource(type=type, id=id))
    kept = {"lease:flat", "image:i", "snapshot:top", "snapshot:base", *blobs("listed", "target")}
    assert await left(house, client) == kept


async def test_an_ingest_without_a_lease_lives_for_a_day(house: House, client: Client) -> None:
    expected = await client.blob("expected")
    await client.leases.create("short")
    with context.use(lease="short"):
        await client.content.open("leased")
    await client.content.open("free")
    opened = await client.content.open("resumed", expected=digest_of("not yet"))
    assert opened.offset == 0
    await client.content.open("old")
    await client.leases.delete("short")
    await house.stop("content")
    with sqlite3.connect(house.root / "root/content/metadata.db") as database:
        database.execute("UPDATE ingests SET expire_at = unixepoch() - 1 WHERE ref = 'old'")
        database.execute("UPDATE ingests SET expected = ? WHERE ref = 'free'", (expected,))
    await house.start("content")
    assert await left(house, client) == {"ingest:free", "ingest:resumed", *blobs("expected")}
    assert len(list((house.root / "root/content/ingest").iterdir())) == 2


async def test_namespaces_have_graphs_of_their_own(house: House, client: Client) -> None:
    other = house.of("other")
    for own in (client, other):
        await own.blob("a")
        await own.blob("m", ref_content=digest_of("a"))
    await client.image("i", "m")
    assert await left(house, client) == {"image:i", *blobs("a", "m")}
    assert await other.there() == set()
    assert await client.content.read(digest_of("a")) == b"a"


# ---- references


@pytest.mark.parametrize(
    ("label", "keeps"),
    [
        ("ref.content", True), ("ref.content.x.y", True), ("ref.content/x", True), ("ref.contentx", False),
        ("ref.content-x", False), ("refcontent", False), ("ref.stream", False), ("ref.snapshot", False),
    ],
)  # fmt: skip
async def test_forms_of_a_reference_to_content(house: House, client: Client, label: str, keeps: bool) -> None:
    digest = await client.blob("a")
    await client.content.put(b"m", digest_of("m"), {f"containerd.io/gc.{label}": digest})
    await client.image("i", "m")
    assert await left(house, client) == {"image:i", *blobs("m", *("a" for _ in range(keeps)))}


@pytest.mark.parametrize(
    ("label", "keeps"),
    [
        (f"ref.snapshot.{SNAPSHOTTER}", True), (f"ref.snapshot.{SNAPSHOTTER}/x", True),
        (f"ref.snapshot.{SNAPSHOTTER}.x", False), ("ref.snapshot.other", False),
    ],
)  # fmt: skip
async def test_forms_of_a_reference_to_a_snapshot(house: House, client: Client, label: str, keeps: bool) -> None:
    await client.snapshot("base")
    await client.snapshot("s", "base")
    await client.content.put(b"m", digest_of("m"), {f"containerd.io/gc.{label}": "s"})
    await client.image("i", "m")
    assert await left(house, client) == {
        "image:i", *blobs("m"), *({"snapshot:s", "snapshot:base"} if keeps else ()),
    }  # fmt: skip


async def test_an_expired_image_goes_unless_it_is_named(house: House, client: Client) -> None:
    await client.blob("kept")
    for name, when in (("past", at(-HOUR)), ("named", at(-HOUR)), ("future", at(HOUR)), ("odd", "soon")):
        await client.blob(name)
        await client.image(name, name, expire=when)
    await client.image("holder", "kept", ref_image_x="named")
    subscriber = await house.bus.subscribe(topic="/images/delete")
    kept = {"image:named", "image:future", "image:odd", "image:holder", *blobs("named", "future", "odd", "kept")}
    assert await left(house, client) == kept
    assert (await anext(subscriber)).event == {"name": "past"}
    await subscriber.close()


async def test_a_snapshot_that_is_collected_is_told_of(house: House, client: Client) -> None:
    subscriber = await house.bus.subscribe(topic="/snapshot/remove")
    await client.snapshot("base")
    await client.snapshot("top", "base")
    await house.collector.collect()
    told = [await anext(subscriber) for _ in range(2)]
    assert [e.event for e in told] == [{"key": key, "snapshotter": SNAPSHOTTER} for key in ("top", "base")]
    assert {e.namespace for e in told} == {"default"}
    await subscriber.close()


async def test_back_references_live_with_what_they_name(house: House, client: Client) -> None:
    await client.blob("m")
    await client.blob("signature", bref_image_x="i")
    await client.blob("of the target", bref_content__x=digest_of("m"))
    await client.blob("of nothing", bref_content=digest_of("nowhere"))
    await client.snapshot("s", bref_container_x="c")
    await client.snapshot("t")
    await client.blob("of a snapshot", **{f"bref_snapshot_{SNAPSHOTTER}__y": "s"})
    await client.image("old", "absent", expire=at(-HOUR), bref_image="i")
    await client.image("i", "m")
    await client.containers.create(Container(id="c", runtime=Runtime(name="runc")))
    kept = {"image:i", "image:old", "snapshot:s", *blobs("m", "signature", "of the target", "of a snapshot")}
    assert await left(house, client) == kept
    await client.containers.delete("c")
    assert await left(house, client) == {"image:i", "image:old", *blobs("m", "signature", "of the target")}
    await client.images.delete("i")
    assert await left(house, client) == set()


async def test_a_conditional_reference_keeps_what_was_used_lately(house: House, client: Client) -> None:
    label = f"cond_snapshot_{SNAPSHOTTER}"
    for key, used in (("new", at(-timedelta(minutes=5))), ("old", at(-timedelta(days=3))), ("odd", "never")):
        await client.snapshots.prepare(SNAPSHOTTER, key, "", {"containerd.io/gc.cond.value-usedat": used})
    conditions = (
        "usedat<1h|new",
        "usedat<24h|old",
        "usedat<24h|odd",
        "usedat>1h|new",
        "size<3|new",
        "usedat<x|new",
        "x",
    )
    for number, value in enumerate(conditions):
        await client.blob(f"b{number}", **{label: value})
        await client.image(f"i{number}", f"b{number}")
    there = await left(house, client)
    assert {t for t in there if t.startswith("snapshot:")} == {"snapshot:new"}
    await client.blob("b1", **{f"{label}__x": "usedat<1m,usedat<100h30m|old"})
    used = {"containerd.io/gc.cond.value-usedat": at(-timedelta(days=3))}
    await client.snapshots.prepare(SNAPSHOTTER, "old", "", used)
    assert "snapshot:old" in await left(house, client)


async def test_circles_go_as_a_whole(house: House, client: Client) -> None:
    await client.blob("a", ref_content=digest_of("b"))
    await client.blob("b", ref_content=digest_of("a"))
    await client.image("i", "a")
    assert await left(house, client) == {"image:i", *blobs("a", "b")}
    await client.images.delete("i")
    assert await left(house, client) == set()


# ---- leases as containerd's clients use them


async def test_a_pull_with_a_collection_between_any_two_steps(house: House, client: Client) -> None:
    async def collect() -> None:
        await house.collector.collect()

    await client.leases.create("pull")
    await client.blob("layer", "pull")
    await collect()
    await client.blob("config", "pull")
    await collect()
    await client.blob("m", "pull", ref_content_c=digest_of("config"), ref_content_l_0=digest_of("layer"))
    await collect()
    with context.use(lease="pull"):
        await client.snapshots.prepare(SNAPSHOTTER, "extract", "")
        await collect()
        await client.snapshots.commit(SNAPSHOTTER, "chain", "extract")
        await collect()
    await client.blob("config", "pull", **{SNAPSHOT_REF: "chain"})
    await collect()
    await client.image("redis", "m")
    await collect()
    await client.leases.delete("pull")
    assert await left(house, client) == {"image:redis", "snapshot:chain", *blobs("m", "config", "layer")}


async def test_what_exists_already_is_on_the_lease_when_it_is_told(house: House, client: Client) -> None:
    digest = await client.blob("a")
    await client.leases.create("pull")
    with context.use(lease="pull"):
        with pytest.raises(AlreadyExists):
            await client.content.open("r", expected=digest)
        with pytest.raises(AlreadyExists):
            await client.content.put(b"a", digest)
    await client.snapshot("s")
    with context.use(lease="pull"), pytest.raises(AlreadyExists):
        await client.snapshots.prepare(SNAPSHOTTER, "s", "")
    assert await left(house, client) == {"lease:pull", "snapshot:s", *blobs("a")}


async def test_an_expiring_image_is_on_the_callers_lease(house: House, client: Client) -> None:
    await client.leases.create("build")
    await client.blob("m")
    with context.use(lease="build"):
        await client.image("tmp", "m", expire=at(-HOUR))
    assert await left(house, client) == {"lease:build", "image:tmp", *blobs("m")}


# ---- waiting for it


async def test_synchronous_deletions_wait_for_the_collection(house: House, client: Client) -> None:
    await client.blob("m")
    await client.image("i", "m")
    await client.leases.create("l")
    await client.blob("a", lease="l")
    await client.images.delete("i", sync=True)
    assert await client.there() == {"lease:l", *blobs("a")}
    await client.leases.delete("l", sync=True)
    assert await client.there() == set()
    with pytest.raises(NotFound):
        await client.images.delete("i", sync=True)


async def test_a_deletion_that_is_sent_twice_waits_twice(house: House, client: Client) -> None:
    await client.blob("m")
    await client.image("i", "m")
    with context.use(key="k"):
        await client.images.delete("i")
    await house.stop("image")
    await house.start("image")
    assert blobs("m") <= await client.there()
    with context.use(key="k"):
        await client.images.delete("i", sync=True)
    assert await client.there() == set()


async def test_those_who_wait_share_a_collection(house: House, client: Client) -> None:
    await client.blob("a")
    outcomes = await asyncio.gather(*(house.collector.collect() for _ in range(20)))
    assert sum(o.removed.get("content", 0) for o in outcomes) >= 1
    assert len({o.seconds for o in outcomes}) <= 3


async def test_a_preview_removes_nothing(house: House, client: Client) -> None:
    digest = await client.blob("a")
    await client.blob("m")
    await client.image("i", "m")
    found = await house.collector.collect(dry_run=True)
    assert (found.removed, found.kept) == ({"content": 1}, 2)
    assert [(d.namespace, d.resource) for d in found.dead] == [("default", Resource(type="content", id=digest))]
    assert await client.there() == {"image:i", *blobs("a", "m")}


async def test_a_collection_with_a_service_away_removes_nothing(house: House, client: Client) -> None:
    await client.blob("a")
    await client.image("i", "a", expire=at(-HOUR))
    await house.stop("snapshot")
    with pytest.raises(Unavailable, match="snapshot"):
        await house.collector.collect()
    await house.start("snapshot")
    assert await client.there() == {"image:i", *blobs("a")}
    assert await left(house, client) == set()


async def test_many_pages(house: House, client: Client) -> None:
    """More than fits into one message, on either side."""
    names = [f"n{i}" for i in range(300)]
    labels = {f"ref_content_{'x' * 1000}{j}": digest_of(f"d{j}") for j in range(8)}
    await asyncio.gather(*(client.blob(name, **labels) for name in names))
    await asyncio.gather(*(client.blob(f"d{j}") for j in range(8)))
    await client.image("i", "n7")
    assert await left(house, client) == {"image:i", *blobs("n7", *(f"d{j}" for j in range(8)))}
