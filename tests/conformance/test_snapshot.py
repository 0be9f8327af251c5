"""What every snapshotter must do, through the proxy of Snapshots, with what it names really mounted."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from wherry_shared import context
from wherry_shared.api.lease import Leases
from wherry_shared.api.snapshot import REBASE_LABEL, REF_LABEL, Snapshots
from wherry_shared.bus import Bus
from wherry_shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry_shared.runtime import Host
from wherry_shared.values import Mount
from wherry_snapshot.__main__ import build

sys.path.append(str(Path(__file__).parent.parent / "snapshot"))  # for snapshot_rig.py

from snapshot_rig import House, mounted, needs_root, tree

pytestmark = needs_root

Write = Callable[[Path], None]


class Shelf:
    """One snapshotter as a caller in the namespace `default` sees it."""

    def __init__(self, house: House, name: str) -> None:
        self.house = house
        self.name = name
        self.api = self.in_namespace("default")
        self._mounts = 0

    def in_namespace(self, namespace: str) -> Snapshots:
        return self.house.bus.proxy(Snapshots, namespace=namespace)

    def mounted(self, mounts: list[Mount]) -> Any:
        self._mounts += 1
        return mounted(mounts, self.house.root / f"mnt{self._mounts}")

    async def layer(self, name: str, parent: str, write: Write) -> None:
        """A committed snapshot: what `write` does to its parent."""
        with self.mounted(await self.api.prepare(self.name, f"{name}-key", parent)) as root:
            write(root)
        await self.api.commit(self.name, name, f"{name}-key")

    async def shown(self, parent: str) -> dict[str, Any]:
        """What a view of a committed snapshot shows."""
        with self.mounted(await self.api.view(self.name, "look", parent)) as root:
            found = tree(root)
        await self.api.remove(self.name, "look")
        return found


@pytest.fixture
async def house(bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    house = House(bus, tmp_path)
    await house.start()
    yield house
    await house.stop()


@pytest.fixture(params=["overlay", "native"])
def shelf(house: House, request: pytest.FixtureRequest) -> Shelf:
    return Shelf(house, request.param)


def put(**files: str) -> Write:
    def write(root: Path) -> None:
        for name, text in files.items():
            (root / name).write_text(text)

    return write


# ---- trees


async def test_a_chain_shows_what_its_layers_did(shelf: Shelf) -> None:
    def first(root: Path) -> None:
        put(kept="1", changed="1", gone="1")(root)
        (root / "emptied").mkdir()
        (root / "emptied/old").write_text("old")
        (root / "replaced").mkdir()
        (root / "replaced/inside").write_text("inside")
        (root / "link").symlink_to("/etc/passwd")

    def second(root: Path) -> None:
        put(changed="2", added="2")(root)
        (root / "gone").unlink()
        (root / "emptied/old").unlink()
        (root / "emptied").rmdir()
        (root / "emptied").mkdir()
        (root / "emptied/new").write_text("new")

    def third(root: Path) -> None:
        put(gone="back")(root)
        (root / "replaced/inside").unlink()
        (root / "replaced").rmdir()
        (root / "replaced").write_text("a file now")
        (root / "link").unlink()

    await shelf.layer("one", "", first)
    await shelf.layer("two", "one", second)
    await shelf.layer("three", "two", third)
    await shelf.layer("four", "three", put(top="4"))
    common = {"kept": "1", "changed": "2", "added": "2", "emptied": None, "emptied/new": "new"}
    assert await shelf.shown("two") == {
        **common, "replaced": None, "replaced/inside": "inside", "link": "-> /etc/passwd",
    }  # fmt: skip
    assert await shelf.shown("four") == {**common, "gone": "back", "replaced": "a file now", "top": "4"}
    assert (await shelf.shown("one"))["gone"] == "1"


async def test_an_active_snapshot_does_not_touch_its_parent(shelf: Shelf) -> None:
    await shelf.layer("base", "", put(a="1", b="1"))
    for key in ("left", "right"):
        with shelf.mounted(await shelf.api.prepare(shelf.name, key, "base")) as root:
            assert tree(root) == {"a": "1", "b": "1"}
            (root / "a").write_text(key)
            (root / "b").unlink()
            assert tree(root) == {"a": key}
    with shelf.mounted(await shelf.api.mounts(shelf.name, "left")) as root:
        assert tree(root) == {"a": "left"}
    assert await shelf.shown("base") == {"a": "1", "b": "1"}


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_a_view_is_read_only(shelf: Shelf, depth: int) -> None:
    parent = ""
    for i in range(depth):
        await shelf.layer(f"layer{i}", parent, put(**{f"file{i}": "text"}))
        parent = f"layer{i}"
    mounts = await shelf.api.view(shelf.name, "view", parent)
    assert await shelf.api.mounts(shelf.name, "view") == mounts
    with shelf.mounted(mounts) as root:
        assert len(tree(root)) == depth
        with pytest.raises(OSError) as caught:
            (root / "new").write_text("")
        assert caught.value.errno == errno.EROFS
    assert (await shelf.api.stat(shelf.name, "view")).kind == "view"


async def test_128_layers(shelf: Shelf) -> None:
    parent = ""
    for i in range(128):
        mounts = await shelf.api.prepare(shelf.name, "next", parent)
        if mounts[0].type == "bind":
            upper = Path(mounts[0].source)
        else:
            upper = Path(next(o for o in mounts[0].options if o.startswith("upperdir=")).partition("=")[2])
        (upper / f"f{i}").write_text(str(i))
        (upper / "top").write_text(str(i))
        await shelf.api.commit(shelf.name, f"l{i:03}", "next")
        parent = f"l{i:03}"
    expected = {"top": "127", **{f"f{i}": str(i) for i in range(128)}}
    assert await shelf.shown(parent) == expected
    with shelf.mounted(await shelf.api.prepare(shelf.name, "rw", parent)) as root:
        assert tree(root) == expected
        (root / "f0").unlink()
        assert "f0" not in tree(root)


# ---- refusals


@pytest.mark.parametrize("name", ["", "zfs", "../x", "x" * 500])
async def test_an_unknown_snapshotter_is_named(shelf: Shelf, name: str) -> None:
    api = shelf.api
    for call in (
        api.prepare(name, "k"), api.view(name, "k"), api.mounts(name, "k"), api.commit(name, "n", "k"),
        api.remove(name, "k"), api.stat(name, "k"), api.update(name, "k", {}), api.walk(name), api.usage(name, "k"),
        api.cleanup(name),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=repr(name[:20])[:-1]):
            await call


async def test_a_taken_key_is_refused(shelf: Shelf) -> None:
    await shelf.layer("committed", "", put(a="1"))
    await shelf.api.prepare(shelf.name, "active")
    await shelf.api.view(shelf.name, "view")
    for key in ("committed", "active", "view"):
        with pytest.raises(AlreadyExists, match=key):
            await shelf.api.prepare(shelf.name, key)
        with pytest.raises(AlreadyExists, match=key):
            await shelf.api.view(shelf.name, key, "committed")
        with pytest.raises(AlreadyExists, match=key):
            await shelf.api.commit(shelf.name, key, "active")


async def test_a_parent_must_be_there_and_committed(shelf: Shelf) -> None:
    await shelf.api.prepare(shelf.name, "active")
    await shelf.api.view(shelf.name, "view")
    for make in (shelf.api.prepare, shelf.api.view):
        with pytest.raises(NotFound, match="nothing"):
            await make(shelf.name, "k", "nothing")
        for parent in ("active", "view"):
            with pytest.raises(InvalidArgument, match=parent):
                await make(shelf.name, "k", parent)
    with pytest.raises(NotFound):
        await shelf.api.stat(shelf.name, "k")


async def test_what_is_not_there_is_not_found(shelf: Shelf) -> None:
    api = shelf.api
    for call in (
        api.mounts(shelf.name, "no"), api.commit(shelf.name, "n", "no"), api.remove(shelf.name, "no"),
        api.stat(shelf.name, "no"), api.update(shelf.name, "no", {}), api.usage(shelf.name, "no"),
    ):  # fmt: skip
        with pytest.raises(NotFound, match="'no'"):
            await call


async def test_only_an_active_snapshot_is_committed(shelf: Shelf) -> None:
    await shelf.layer("base", "", put(a="1"))
    await shelf.api.view(shelf.name, "view", "base")
    for key in ("view", "base"):
        with pytest.raises(FailedPrecondition, match=key):
            await shelf.api.commit(shelf.name, "name", key)
    with pytest.raises(FailedPrecondition, match="base"):
        await shelf.api.mounts(shelf.name, "base")
    assert (await shelf.api.stat(shelf.name, "view")).kind == "view"


async def test_what_others_stand_on_stays(shelf: Shelf) -> None:
    await shelf.layer("base", "", put(a="1"))
    await shelf.api.view(shelf.name, "child", "base")
    with pytest.raises(FailedPrecondition, match="remove"):
        await shelf.api.remove(shelf.name, "base")
    await shelf.api.remove(shelf.name, "child")
    await shelf.api.remove(shelf.name, "base")
    await shelf.api.cleanup(shelf.name)
    assert shelf.house.directories(shelf.name) == set()


async def test_a_removed_name_starts_afresh(shelf: Shelf) -> None:
    await shelf.layer("name", "", put(secret="1"))
    await shelf.api.remove(shelf.name, "name")
    with shelf.mounted(await shelf.api.prepare(shelf.name, "name")) as root:
        assert tree(root) == {}


async def test_namespaces_do_not_see_each_other(shelf: Shelf) -> None:
    await shelf.layer("base", "", put(a="mine"))
    other = shelf.in_namespace("other")
    with pytest.raises(NotFound):
        await other.stat(shelf.name, "base")
    with pytest.raises(NotFound):
        await other.prepare(shelf.name, "k", "base")
    with pytest.raises(NotFound):
        await other.remove(shelf.name, "base")
    with shelf.mounted(await other.prepare(shelf.name, "base")) as root:
        assert tree(root) == {}
    assert [i.name for i in (await other.walk(shelf.name)).items] == ["base"]
    assert (await other.walk(shelf.name)).items[0].kind == "active"


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
    assert stored == live
    await shelf.api.view(shelf.name, "view", "base")
    assert (await shelf.api.usage(shelf.name, "view")).inodes == 0
    await shelf.api.prepare(shelf.name, "child", "base")
    child = await shelf.api.usage(shelf.name, "child")
    assert child.inodes == (1 if shelf.name == "overlay" else 3)  # a native child is a copy


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
        async with asyncio.timeout(10):
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
        return sorted((r.type, r.id) for r in await leases.resources("pull"))

    kind = f"snapshots/{shelf.name}"
    with context.use(lease="pull"):
        await shelf.api.prepare(shelf.name, "key")
        assert await kept() == [(kind, "key")]
        await shelf.api.commit(shelf.name, "name", "key")
        assert await kept() == [(kind, "name")]
        await shelf.api.view(shelf.name, "view", "name")
        assert await kept() == [(kind, "name"), (kind, "view")]
        await shelf.api.remove(shelf.name, "view")
        assert await kept() == [(kind, "name")]
    await shelf.api.prepare(shelf.name, "other")
    await leases.create("second")
    with context.use(lease="second"):
        with pytest.raises(AlreadyExists):
            await shelf.api.prepare(shelf.name, "other")
        with pytest.raises(AlreadyExists):
            await shelf.api.prepare(shelf.name, "extract", labels={REF_LABEL: "name"})
    assert {r.id for r in await leases.resources("second")} >= {"other", "name"}


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


# ---- once, whatever happens


async def test_the_same_key_has_one_effect(shelf: Shelf) -> None:
    async def twice(call: Callable[[], Any], key: str) -> None:
        with context.use(key=key):
            first = await asyncio.gather(call(), call())
            await shelf.house.restart()
            assert await call() == first[0] == first[1]

    api = shelf.api
    await twice(lambda: api.prepare(shelf.name, "k"), "1")
    await twice(lambda: api.update(shelf.name, "k", {"a": "b"}), "2")
    await twice(lambda: api.commit(shelf.name, "n", "k"), "3")
    await twice(lambda: api.view(shelf.name, "v", "n"), "4")
    await twice(lambda: api.remove(shelf.name, "v"), "5")
    await twice(lambda: api.remove(shelf.name, "n"), "6")
    await api.cleanup(shelf.name)
    assert shelf.house.directories(shelf.name) == set()


async def test_of_many_at_once_one_wins(shelf: Shelf) -> None:
    await shelf.layer("base", "", put(a="1"))
    calls = [shelf.api.prepare(shelf.name, "same", "base") for _ in range(20)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(r, list) for r in results) == 1
    assert sum(isinstance(r, AlreadyExists) for r in results) == 19
    commits = [shelf.api.commit(shelf.name, f"n{i}", "same") for i in range(5)]
    results = await asyncio.gather(*commits, return_exceptions=True)
    assert sum(isinstance(r, NotFound) for r in results) == 4
    await shelf.api.cleanup(shelf.name)
    assert len(shelf.house.directories(shelf.name)) == 2


async def test_a_child_and_the_end_of_its_parent_exclude_each_other(shelf: Shelf) -> None:
    for i in range(10):
        await shelf.layer("base", "", put(**{f"f{n}": "x" for n in range(50)}))
        child, removal = await asyncio.gather(
            shelf.api.prepare(shelf.name, f"child{i}", "base"), shelf.api.remove(shelf.name, "base"),
            return_exceptions=True,
        )  # fmt: skip
        if removal is None:
            assert isinstance(child, NotFound)
        else:
            assert isinstance(removal, FailedPrecondition) and isinstance(child, list)
            with shelf.mounted(child) as root:
                assert len(tree(root)) == 50
            await shelf.api.remove(shelf.name, f"child{i}")
            await shelf.api.remove(shelf.name, "base")
    await shelf.api.cleanup(shelf.name)
    assert shelf.house.directories(shelf.name) == set()


async def test_snapshots_outlive_the_service(shelf: Shelf) -> None:
    await shelf.layer("base", "", put(a="1"))
    mounts = await shelf.api.prepare(shelf.name, "key", "base")
    await shelf.house.restart()
    assert await shelf.api.mounts(shelf.name, "key") == mounts
    with shelf.mounted(mounts) as root:
        assert tree(root) == {"a": "1"}
    await shelf.layer("two", "base", put(b="2"))
    assert await shelf.shown("two") == {"a": "1", "b": "2"}


# ---- rebase


@pytest.mark.parametrize("shelf", ["overlay"], indirect=True)
async def test_layers_apart_become_a_chain(shelf: Shelf) -> None:
    api, labels = shelf.api, {REBASE_LABEL: "1"}
    await shelf.layer("one", "", put(a="1", gone="1"))
    mounts = {key: await api.prepare(shelf.name, key, labels=labels) for key in ("two-key", "three-key")}
    assert [m.type for m in mounts["two-key"]] == ["overlay"]
    upper = {key: Path(_option(m[0], "upperdir")) for key, m in mounts.items()}
    os.mknod(upper["two-key"] / "gone", 0o600 | 0o020000, os.makedev(0, 0))  # a whiteout, as diff writes it
    (upper["two-key"] / "b").write_text("2")
    (upper["three-key"] / "a").write_text("3")
    with shelf.mounted(mounts["two-key"]) as root:
        assert tree(root) == {"b": "2"}
    await api.update(shelf.name, "two-key", {})  # labels may go: how it was prepared stays
    assert await api.mounts(shelf.name, "two-key") == mounts["two-key"]
    done = await api.commit(shelf.name, "two", "two-key", "one")
    assert done.parent == "one"
    assert (await api.commit(shelf.name, "three", "three-key", "two")).parent == "two"
    assert await shelf.shown("three") == {"a": "3", "b": "2"}
    with pytest.raises(FailedPrecondition, match="remove"):
        await api.remove(shelf.name, "one")


@pytest.mark.parametrize("shelf", ["overlay"], indirect=True)
async def test_a_base_shows_no_whiteouts(shelf: Shelf) -> None:
    (mount,) = await shelf.api.prepare(shelf.name, "key", labels={REBASE_LABEL: "1"})
    upper = Path(_option(mount, "upperdir"))
    (upper / "dir").mkdir()
    for name in ("gone", "dir/gone"):
        os.mknod(upper / name, 0o020000, os.makedev(0, 0))
    os.mknod(upper / "dir/null", 0o666 | 0o020000, os.makedev(1, 3))
    await shelf.api.commit(shelf.name, "base", "key")
    assert await shelf.shown("base") == {"dir": None, "dir/null": None}


def _option(mount: Mount, name: str) -> str:
    return next(o.partition("=")[2] for o in mount.options if o.startswith(f"{name}="))


async def test_a_rebase_is_refused_where_it_would_lie(shelf: Shelf) -> None:
    api = shelf.api
    await shelf.layer("one", "", put(a="1"))
    await api.prepare(shelf.name, "plain")
    await api.prepare(shelf.name, "marked", labels={REBASE_LABEL: "1"})
    await api.prepare(shelf.name, "child", "one")
    await shelf.layer("two", "", put(a="2"))
    if shelf.name == "native":
        with pytest.raises(InvalidArgument, match="rebase"):
            await api.commit(shelf.name, "n", "marked", "one")
    else:
        with pytest.raises(FailedPrecondition, match="rebase"):
            await api.commit(shelf.name, "n", "plain", "one")
        with pytest.raises(FailedPrecondition, match="one"):
            await api.commit(shelf.name, "n", "child", "two")
        with pytest.raises(NotFound, match="nothing"):
            await api.commit(shelf.name, "n", "marked", "nothing")
        with pytest.raises(InvalidArgument, match="plain"):
            await api.commit(shelf.name, "n", "marked", "plain")
    assert (await api.commit(shelf.name, "n", "child", "one")).parent == "one"  # the parent that it has
    assert (await api.commit(shelf.name, "base", "marked")).parent == ""
    assert await shelf.shown("base") == {}


# ---- the host


async def test_introspection_is_told(shelf: Shelf) -> None:
    plugins = json.loads(shelf.house.host.metadata["plugins"])
    plugin = next(p for p in plugins if p["id"] == shelf.name)
    assert plugin["type"] == "io.containerd.snapshotter.v1"
    assert plugin["capabilities"] == (["rebase"] if shelf.name == "overlay" else [])
    assert plugin["exports"] == {"root": str(shelf.house.root / "root/snapshot" / shelf.name)}


async def test_nobody_else_can_walk_into_the_snapshots(shelf: Shelf) -> None:
    at = shelf.house.root / "root/snapshot" / shelf.name / "snapshots"
    for path in (at, at.parent):
        path.chmod(0o755)
    old = os.umask(0)
    try:
        await shelf.house.restart()
        await shelf.layer("one", "", put(a="1"))
    finally:
        os.umask(old)
    assert [p.stat().st_mode & 0o777 for p in (at, at.parent)] == [0o700, 0o700]


async def test_a_second_service_on_the_root_is_refused(shelf: Shelf) -> None:
    with pytest.raises(FailedPrecondition, match="in use by another snapshot service"):
        async with AsyncExitStack() as stack:
            await build(Host(shelf.house.host.settings, shelf.house.bus, stack))
