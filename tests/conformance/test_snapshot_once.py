"""Every snapshotter: one effect of each request, rebase where it can, and its place on the host."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from shelves import Shelf, put
from snapshot_rig import needs_root, tree
from wherry_shared import context
from wherry_shared.api.snapshot import REBASE_LABEL
from wherry_shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry_shared.runtime import Host
from wherry_shared.values import Mount
from wherry_snapshot.__main__ import build

pytestmark = needs_root


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


async def test_layers_apart_become_a_chain(shelf: Shelf) -> None:
    if "rebase" not in shelf.capabilities:
        with pytest.raises(FailedPrecondition, match="rebase"):
            await shelf.api.prepare(shelf.name, "key", labels={REBASE_LABEL: "1"})
        return
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


async def test_commits_of_a_chain_come_in_any_order(shelf: Shelf) -> None:
    if "rebase" not in shelf.capabilities:
        return
    api, labels = shelf.api, {REBASE_LABEL: "1"}
    names = ["one", "two", "three"]
    for name in names:
        await api.prepare(shelf.name, f"{name}-key", labels=labels)
    with pytest.raises(NotFound, match="one"):
        await api.commit(shelf.name, "two", "two-key", "one", patience=0.05)
    pairs = list(zip(names, ["", *names], strict=False))
    waiting = [
        asyncio.create_task(api.commit(shelf.name, name, f"{name}-key", parent, patience=30.0))
        for name, parent in reversed(pairs[1:])
    ]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    await api.commit(shelf.name, "one", "one-key")
    assert [info.parent for info in await asyncio.gather(*waiting)] == ["two", "one"]


async def test_a_base_shows_no_whiteouts(shelf: Shelf) -> None:
    if "rebase" not in shelf.capabilities:
        return  # nothing in it writes whiteouts
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
    await api.prepare(shelf.name, "child", "one", {REBASE_LABEL: "1"})  # it has a parent: the label says nothing
    await shelf.layer("two", "", put(a="2"))
    if "rebase" not in shelf.capabilities:
        for key in ("plain", "child"):
            with pytest.raises(InvalidArgument, match="rebase"):
                await api.commit(shelf.name, "n", key, "two")
    else:
        await api.prepare(shelf.name, "marked", labels={REBASE_LABEL: "1"})
        with pytest.raises(FailedPrecondition, match="rebase"):
            await api.commit(shelf.name, "n", "plain", "one")
        with pytest.raises(FailedPrecondition, match="one"):
            await api.commit(shelf.name, "n", "child", "two")
        with pytest.raises(NotFound, match="nothing"):
            await api.commit(shelf.name, "n", "marked", "nothing")
        with pytest.raises(InvalidArgument, match="plain"):
            await api.commit(shelf.name, "n", "marked", "plain")
    assert (await api.commit(shelf.name, "n", "child", "one")).parent == "one"  # the parent that it has
    assert (await api.commit(shelf.name, "base", "plain")).parent == ""
    assert await shelf.shown("base") == {}


# ---- the host


async def test_introspection_is_told(shelf: Shelf) -> None:
    plugin = shelf.house.plugin(shelf.name)
    assert plugin["type"] == "io.containerd.snapshotter.v1"
    assert set(plugin["capabilities"]) <= {"rebase", "remap-ids"}
    assert shelf.name in await shelf.api.snapshotters()
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
