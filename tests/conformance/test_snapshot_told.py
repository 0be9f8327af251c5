"""What every snapshotter tells: labels, walks, usage, events, and what it puts on a lease."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from housebus import PATIENCE
from shelves import Shelf, put
from snapshot_rig import needs_root
from wherry_shared import context
from wherry_shared.api.lease import Leases
from wherry_shared.api.snapshot import REF_LABEL
from wherry_shared.errors import AlreadyExists, InvalidArgument, NotFound

pytestmark = needs_root


# ---- what is told


async def test_commit_turns_the_key_into_the_name(shelf: Shelf) -> None:
    await shelf.layer("base", "", put(a="1"))
    await shelf.api.prepare(shelf.name, "key", "base", {"of": "prepare", "empty": ""})
    active = await shelf.api.stat(shelf.name, "key")
    assert (active.kind, active.parent, active.labels) == ("active", "base", {"of": "prepare"})
    assert active.created_at == active.updated_at
    done = await shelf.api.commit(shelf.name, "name", "key", labels={"of": "commit", "none": ""})
    assert done == await shelf.api.stat(shelf.name, "name")
    assert (done.kind, done.name, done.parent, done.labels) == ("committed", "name", "base", {"of": "commit"})
    assert done.created_at == done.updated_at > active.created_at
    with pytest.raises(NotFound):
        await shelf.api.stat(shelf.name, "key")
    await shelf.api.prepare(shelf.name, "key", "name")


async def test_labels_change_by_their_masks(shelf: Shelf) -> None:
    api = shelf.api
    await api.prepare(shelf.name, "k", labels={"a": "1", "b.c": "1"})
    before = await api.stat(shelf.name, "k")
    changed = await api.update(shelf.name, "k", {"b.c": "2", "d": "2"}, ["labels.b.c"])
    assert changed.labels == {"a": "1", "b.c": "2"}
    assert changed.created_at == before.created_at < changed.updated_at
    assert (await api.update(shelf.name, "k", {"a": ""}, ["labels.a"])).labels == {"b.c": "2"}
    assert (await api.update(shelf.name, "k", {"x": "1", "y": ""})).labels == {"x": "1"}
    assert (await api.update(shelf.name, "k", {}, ["labels"])).labels == {}
    for path in ("parent", "kind", "labels.", "created_at"):
        with pytest.raises(InvalidArgument, match=path):
            await api.update(shelf.name, "k", {}, [path])
    with pytest.raises(InvalidArgument, match="4096"):
        await api.prepare(shelf.name, "k2", labels={"a": "x" * 4096})


async def test_a_snapshot_that_is_there_already_need_not_be_prepared(shelf: Shelf) -> None:
    await shelf.layer("chain", "", put(a="1"))
    await shelf.api.prepare(shelf.name, "active")
    with pytest.raises(AlreadyExists, match="chain"):
        await shelf.api.prepare(shelf.name, "extract", labels={REF_LABEL: "chain"})
    await shelf.api.prepare(shelf.name, "extract1", labels={REF_LABEL: "active"})
    await shelf.api.prepare(shelf.name, "extract2", labels={REF_LABEL: "not yet"})


async def test_usage_is_what_a_snapshot_takes_itself(shelf: Shelf) -> None:
    def write(root: Path) -> None:
        (root / "a").write_bytes(os.urandom(100_000))
        os.link(root / "a", root / "b")
        with (root / "sparse").open("wb") as f:
            f.truncate(1 << 30)

    mounts = await shelf.api.prepare(shelf.name, "key")
    empty = await shelf.api.usage(shelf.name, "key")
    assert empty.inodes == 1
    with shelf.mounted(mounts) as root:
        write(root)
        live = await shelf.api.usage(shelf.name, "key")
        blocks = (root / "a").stat().st_blocks * 512
    assert (live.inodes, live.size) == (3, empty.size + blocks)
    await shelf.api.commit(shelf.name, "base", "key")
    stored = await shelf.api.usage(shelf.name, "base")
    assert 1 <= stored.inodes <= live.inodes and blocks <= stored.size <= live.size + (2 << 20)  # a hole is not counted
    await shelf.api.view(shelf.name, "view", "base")
    assert (await shelf.api.usage(shelf.name, "view")).inodes == 0
    await shelf.api.prepare(shelf.name, "child", "base")
    child = await shelf.api.usage(shelf.name, "child")
    assert 1 <= child.inodes <= live.inodes  # where a child is a copy, that is what it takes


async def test_a_walk_goes_by_pages_and_filters(shelf: Shelf) -> None:
    api = shelf.api
    await shelf.layer("base", "", put(a="1"))
    for i in range(150):
        await api.view(shelf.name, f"v{i:03}", "base" if i % 2 else "", {"i": str(i), "dotted.key/x": "y" * (i % 3)})
    names = [f"v{i:03}" for i in range(150)]
    found, after = [], ""
    while True:
        page = await api.walk(shelf.name, after=after, limit=40)
        found += [i.name for i in page.items]
        assert len(page.items) <= 40
        after = page.next
        if not after:
            break
        assert after == found[-1]
    assert found == ["base", *names]

    async def matching(*filters: str) -> list[str]:
        return [i.name for i in (await api.walk(shelf.name, list(filters))).items]

    assert await matching("kind==committed") == ["base"]
    assert await matching("parent==base") == names[1::2]
    assert await matching("name==v003", 'labels."i"==7') == ["v003", "v007"]
    assert await matching("kind==view,labels.i~=^1.0$") == ["v100", "v110", "v120", "v130", "v140"]
    assert len(await matching('labels."dotted.key/x"')) == 100
    with pytest.raises(InvalidArgument):
        await matching("kind==")
    with pytest.raises(InvalidArgument):
        await matching("kind=committed")


async def test_a_page_fits_into_a_message(shelf: Shelf) -> None:
    labels = {f"l{i}": "x" * 4000 for i in range(60)}
    for i in range(5):
        await shelf.api.view(shelf.name, f"v{i}", labels=labels)
    sizes, after = [], ""
    while True:
        page = await shelf.api.walk(shelf.name, after=after)
        sizes.append(len(page.items))
        after = page.next
        if not after:
            break
    assert sum(sizes) == 5 and max(sizes) < 3


async def test_events_tell_what_changed(shelf: Shelf) -> None:
    async with await shelf.house.bus.subscribe(topic="") as events:
        await shelf.api.prepare(shelf.name, "base-key")
        await shelf.api.commit(shelf.name, "base", "base-key")
        await shelf.api.view(shelf.name, "view", "base")
        await shelf.api.prepare(shelf.name, "key", "base")
        with pytest.raises(AlreadyExists):
            await shelf.api.prepare(shelf.name, "key", "base")
        await shelf.api.remove(shelf.name, "key")
        async with asyncio.timeout(PATIENCE):
            told = [await anext(events) for _ in range(4)]
    sn = shelf.name
    assert [(e.namespace, e.topic, e.event) for e in told] == [
        ("default", "/snapshot/prepare", {"key": "base-key", "parent": "", "snapshotter": sn}),
        ("default", "/snapshot/commit", {"key": "base-key", "name": "base", "snapshotter": sn}),
        ("default", "/snapshot/prepare", {"key": "key", "parent": "base", "snapshotter": sn}),
        ("default", "/snapshot/remove", {"key": "key", "snapshotter": sn}),
    ]


# ---- leases


async def test_what_is_made_under_a_lease_is_kept(shelf: Shelf) -> None:
    leases = shelf.house.bus.proxy(Leases, namespace="default")
    await leases.create("pull")

    async def kept() -> list[tuple[str, str]]:
        return sorted((r.type, r.id) for r in (await leases.resources("pull")).items)

    async def kept_soon(wanted: list[tuple[str, str]]) -> None:
        """A key that is no more is let go of when its call has been answered."""
        async with asyncio.timeout(PATIENCE):
            while await kept() != wanted:
                await asyncio.sleep(0.01)

    kind = f"snapshots/{shelf.name}"
    with context.use(lease="pull"):
        await shelf.api.prepare(shelf.name, "key")
        assert await kept() == [(kind, "key")]
        await shelf.api.commit(shelf.name, "name", "key")
        assert (kind, "name") in await kept()
        await kept_soon([(kind, "name")])
        await shelf.api.view(shelf.name, "view", "name")
        assert await kept() == [(kind, "name"), (kind, "view")]
        await shelf.api.remove(shelf.name, "view")
        await kept_soon([(kind, "name")])
    await shelf.api.prepare(shelf.name, "other")
    await leases.create("second")
    with context.use(lease="second"):
        with pytest.raises(AlreadyExists):
            await shelf.api.prepare(shelf.name, "other")
        with pytest.raises(AlreadyExists):
            await shelf.api.prepare(shelf.name, "extract", labels={REF_LABEL: "name"})
    assert {r.id for r in (await leases.resources("second")).items} >= {"other", "name"}


async def test_an_unknown_lease_makes_nothing(shelf: Shelf) -> None:
    await shelf.api.prepare(shelf.name, "key")
    with context.use(lease="nowhere"):
        for call in (
            shelf.api.prepare(shelf.name, "new"), shelf.api.view(shelf.name, "new"),
            shelf.api.commit(shelf.name, "name", "key"),
        ):  # fmt: skip
            with pytest.raises(NotFound, match="nowhere"):
                await call
    assert [i.name for i in (await shelf.api.walk(shelf.name)).items] == ["key"]
