"""What every snapshotter must do, through the proxy of Snapshots, with what it names really mounted."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from shelves import Shelf, put
from snapshot_rig import needs_root, tree
from wherry_shared.api.snapshot import GID_LABEL, UID_LABEL
from wherry_shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

pytestmark = needs_root


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
        if mounts[-1].type == "bind":
            upper = Path(mounts[0].source)
        else:
            upper = Path(next(o for o in mounts[-1].options if o.startswith("upperdir=")).partition("=")[2])
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


# ---- other owners


async def test_ids_are_mapped_or_the_wish_is_refused(shelf: Shelf) -> None:
    """A container must not run on files whose owners are not what it asked for."""
    await shelf.layer("base", "", put(a="1"))
    labels = {UID_LABEL: "0:100000:65536", GID_LABEL: "0:200000:65536"}
    if "remap-ids" not in shelf.capabilities:
        with pytest.raises(FailedPrecondition, match="map ids"):
            await shelf.api.prepare(shelf.name, "mapped", "base", labels=labels)
        return
    (mount,) = await shelf.api.prepare(shelf.name, "mapped", "base", labels=labels)
    assert mount.options[:2] == ["uidmap=0:100000:65536", "gidmap=0:200000:65536"]
