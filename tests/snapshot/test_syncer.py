"""What is committed survives a power cut, or is taken back after it: never shown with data missing."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import stat
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from node import eventually, small_disk
from snapshot_rig import House, mounted, needs_root, tree
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.bus import Bus
from wherry_shared.errors import DataLoss, InvalidArgument, NotFound
from wherry_shared.memory import MemoryTransport
from wherry_snapshot import syncer
from wherry_snapshot.backends.directories import Directories
from wherry_snapshot.backends.native import NativeBackend
from wherry_snapshot.backends.overlay import OverlayBackend

pytestmark = needs_root


@asynccontextmanager
async def housed(root: Path, **options: str) -> AsyncIterator[House]:
    house = House(Bus(MemoryTransport(), node="n1"), root, options)
    await house.start()
    try:
        yield house
    finally:
        await house.stop()


def api_of(house: House) -> Snapshots:
    return house.bus.proxy(Snapshots, namespace="default")


async def commit(house: House, mnt: Path, name: str = "base", parent: str = "") -> None:
    with mounted(await api_of(house).prepare("overlay", "key", parent), mnt) as at:
        (at / name).write_text("x" * 5000)
    await api_of(house).commit("overlay", name, "key")


def marked(house: House) -> int:
    """How many committed snapshots are not known to be on the disk."""
    connection = sqlite3.connect(house.root / "root/snapshot/metadata.db")
    found: int = connection.execute("SELECT count(*) FROM unsynced").fetchone()[0]
    connection.close()
    return found


@pytest.fixture
def reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that says which boot this is."""
    boot = tmp_path / "boot_id"
    boot.write_text("one\n")
    monkeypatch.setattr(syncer, "boot_id", lambda: boot.read_text().strip())
    yield boot


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each flush."""
    done: list[int] = []
    real = OverlayBackend.sync

    def sync(self: OverlayBackend) -> None:
        real(self)
        done.append(1)

    monkeypatch.setattr(OverlayBackend, "sync", sync)
    return done


async def test_a_flush_soon_follows_and_serves_many(
    tmp_path: Path, flushes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syncer, "DELAY", 60.0)
    async with housed(tmp_path) as house:
        for i in range(3):
            await commit(house, tmp_path / "mnt", f"layer{i}", f"layer{i - 1}" if i else "")
        assert marked(house) == 3 and not flushes
    assert len(flushes) == 1 and marked(house) == 0  # the end does not wait for the delay
    monkeypatch.setattr(syncer, "DELAY", 0.0)
    async with housed(tmp_path) as house:
        await commit(house, tmp_path / "mnt", "more")
        await async_eventually(lambda: not marked(house))
        assert len(flushes) == 2


async def test_what_is_committed_during_a_flush_waits_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was prepared before: its directory is on the disk then, and its files are not."""
    monkeypatch.setattr(syncer, "DELAY", 0.0)
    flushing, go_on = threading.Event(), threading.Event()

    def sync(self: OverlayBackend) -> None:
        flushing.set()
        assert go_on.wait(60)

    async with housed(tmp_path) as house:
        await api_of(house).prepare("overlay", "later", "")
        with monkeypatch.context() as patch:
            patch.setattr(OverlayBackend, "sync", sync)
            await commit(house, tmp_path / "mnt", "first")
            assert await asyncio.to_thread(flushing.wait, 60)
            monkeypatch.setattr(syncer, "DELAY", 60.0)
            await api_of(house).commit("overlay", "second", "later")
            go_on.set()
            await async_eventually(lambda: marked(house) == 1)
    assert marked(house) == 0


async def async_eventually(condition: object) -> None:
    assert callable(condition)
    await asyncio.to_thread(eventually, condition, "it does not come about", 60)


async def test_a_flush_that_fails_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: OverlayBackend) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(OverlayBackend, "sync", broken)
        async with housed(tmp_path) as house:
            await commit(house, tmp_path / "mnt")
        assert marked(house) == 1
    async with housed(tmp_path) as house:
        await api_of(house).stat("overlay", "base")
    assert marked(house) == 0


@contextmanager
def unflushed_still(monkeypatch: pytest.MonkeyPatch, backend: type[Directories]) -> Iterator[None]:
    """No flush succeeds: the power goes before."""

    def sync(self: Directories) -> None:
        raise OSError(5, "the power goes")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "sync", sync)
        yield


async def unflushed(root: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Commit these, each on the one before, and die before they are flushed."""
    with unflushed_still(monkeypatch, OverlayBackend):
        async with housed(root) as house:
            parent = ""
            for name in names:
                await commit(house, root / "mnt", name, parent)
                parent = name


async def test_after_a_power_cut_what_was_not_flushed_is_taken_back(
    tmp_path: Path, reboot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with housed(tmp_path) as house:
        await commit(house, tmp_path / "mnt", "flushed")
    await unflushed(tmp_path, monkeypatch, "one", "two")
    async with housed(tmp_path) as house:  # the service alone has died: the page cache is there still
        assert {i.name for i in (await api_of(house).walk("overlay")).items} == {"flushed", "one", "two"}
    await unflushed(tmp_path, monkeypatch, "three", "four")
    reboot.write_text("two\n")
    async with housed(tmp_path) as house:
        api = api_of(house)
        assert {i.name for i in (await api.walk("overlay")).items} == {"flushed", "one", "two"}
        await api.cleanup("overlay")
        assert len(house.directories("overlay")) == 3
        with pytest.raises(NotFound):
            await api.prepare("overlay", "key", "three")
        await commit(house, tmp_path / "mnt", "three")
    async with housed(tmp_path) as house:
        await api_of(house).stat("overlay", "three")


async def test_what_has_containers_on_it_stays_and_is_refused(
    tmp_path: Path, reboot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await unflushed(tmp_path, monkeypatch, "one", "two")
    with unflushed_still(monkeypatch, OverlayBackend):
        async with housed(tmp_path) as house:
            await api_of(house).prepare("overlay", "container", "one")
    reboot.write_text("two\n")
    for _ in range(2):  # it is not forgotten by another start
        async with housed(tmp_path) as house:
            api = api_of(house)
            assert {i.name for i in (await api.walk("overlay")).items} == {"one", "container"}
            for call in (
                api.mounts("overlay", "container"), api.prepare("overlay", "more", "one"),
                api.view("overlay", "more", "one"), api.commit("overlay", "name", "container"),
            ):  # fmt: skip
                with pytest.raises(DataLoss, match="may lack data"):
                    await call
    async with housed(tmp_path) as house:
        await api_of(house).remove("overlay", "container")
        await api_of(house).remove("overlay", "one")
        await commit(house, tmp_path / "mnt", "one")
        assert await api_of(house).view("overlay", "look", "one")


async def test_the_setting(tmp_path: Path, flushes: list[int]) -> None:
    async with housed(tmp_path / "off", sync="off") as house:
        await commit(house, tmp_path / "mnt")
        assert marked(house) == 0
    assert not flushes
    async with housed(tmp_path / "commit", sync="commit") as house:
        await commit(house, tmp_path / "mnt")
        assert len(flushes) == 1 and marked(house) == 0
    assert len(flushes) == 1
    with pytest.raises(InvalidArgument, match="background, commit, off"):
        async with housed(tmp_path / "x", sync="sometimes"):
            pass


async def test_what_was_being_unpacked_as_the_power_went_keeps_nothing(
    tmp_path: Path, reboot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a pull that was cut off in its third layer: the next one can unpack all."""
    await unflushed(tmp_path, monkeypatch, "one", "two")
    key = f"extract-85fb3fa8d5eefa55 sha256:{'d' * 64}"
    with unflushed_still(monkeypatch, OverlayBackend):
        async with housed(tmp_path) as house:
            await api_of(house).prepare("overlay", key, "two")
    reboot.write_text("two\n")
    async with housed(tmp_path) as house:
        assert (await api_of(house).walk("overlay")).items == []
        await commit(house, tmp_path / "mnt", "one")


async def test_a_prepared_directory_that_the_power_took_is_made_again(tmp_path: Path, reboot: Path) -> None:
    """The row is durable when it is answered, the directory when the filesystem writes it."""
    trees = tmp_path / "root/snapshot/overlay/snapshots"
    async with housed(tmp_path) as house:
        await commit(house, tmp_path / "mnt")
    async with housed(tmp_path) as house:
        await api_of(house).prepare("overlay", "one", "base")
        await api_of(house).view("overlay", "look", "base")
        names = sorted(os.listdir(trees), key=int)
    for name in names[1:]:
        shutil.rmtree(trees / name)
    (trees / f"new-{names[1]}").mkdir()
    async with housed(tmp_path) as house:  # the same boot: it was not the power
        assert sorted(os.listdir(trees)) == [names[0], f"new-{names[1]}"]
        with pytest.raises(DataLoss, match="its directory"):
            await api_of(house).usage("overlay", "one")
    reboot.write_text("two\n")
    async with housed(tmp_path) as house:
        with mounted(await api_of(house).mounts("overlay", "one"), tmp_path / "mnt") as at:
            assert os.listdir(at) == ["base"]
            (at / "more").write_text("x")
        assert sorted(os.listdir(trees), key=int) == names
    for boot in ("three\n", "four\n"):  # it may go again until it is known to be on the disk
        reboot.write_text(boot)
        if boot == "three\n":
            shutil.rmtree(trees / names[1])
        async with housed(tmp_path):
            assert sorted(os.listdir(trees), key=int) == names


@pytest.mark.parametrize("snapshotter", ["overlay", "erofs"])
@pytest.mark.parametrize(("lost", "kept"), [(["fs"], []), (["work"], ["mine"]), (["fs", "work"], [])])
async def test_a_prepared_directory_of_which_the_power_took_a_part(
    tmp_path: Path, reboot: Path, snapshotter: str, lost: list[str], kept: list[str]
) -> None:
    """A btrfs writes a directory, and later what was made in it; what its owner fsynced is there in any case."""
    async with housed(tmp_path) as house:
        with mounted(await api_of(house).prepare(snapshotter, "one"), tmp_path / "mnt") as at:
            (at / "mine").write_text("x")
        await api_of(house).view(snapshotter, "look", "")
        (directory, view) = sorted((tmp_path / f"root/snapshot/{snapshotter}/snapshots").iterdir())
    for part in lost:
        shutil.rmtree(directory / part)
    if "fs" in lost:
        shutil.rmtree(view / "fs")
    reboot.write_text("two\n")
    async with housed(tmp_path) as house:
        for key in ("one", "look"):
            with mounted(await api_of(house).mounts(snapshotter, key), tmp_path / "mnt") as at:
                assert os.listdir(at) == (kept if key == "one" else [])
        assert stat.S_IMODE((directory / "work").stat().st_mode) == 0o711
        assert stat.S_IMODE((directory / "fs").stat().st_mode) == 0o755


async def test_what_stands_on_a_layer_that_the_power_took(
    tmp_path: Path, reboot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both directories are gone; another that was just prepared is made again all the same."""
    trees = tmp_path / "root/snapshot/overlay/snapshots"
    await unflushed(tmp_path, monkeypatch, "layer")
    with unflushed_still(monkeypatch, OverlayBackend):
        async with housed(tmp_path) as house:
            await api_of(house).prepare("overlay", "container", "layer")
            await api_of(house).prepare("overlay", "other")
    for path in trees.iterdir():
        shutil.rmtree(path)
    for boot in ("two\n", "three\n"):
        reboot.write_text(boot)
        async with housed(tmp_path) as house:
            api = api_of(house)
            with mounted(await api.mounts("overlay", "other"), tmp_path / "mnt") as at:
                assert os.listdir(at) == []
            with pytest.raises(DataLoss, match="may lack data"):
                await api.mounts("overlay", "container")
    async with housed(tmp_path) as house:
        await api_of(house).remove("overlay", "container")
        await api_of(house).remove("overlay", "layer")
        await commit(house, tmp_path / "mnt", "layer")


async def test_a_copy_that_the_power_may_have_taken_a_part_of_is_refused(
    tmp_path: Path, reboot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent's files were not durable in it, what its owner fsynced was: nobody can tell what is missing."""
    async with housed(tmp_path) as house:
        with mounted(await api_of(house).prepare("native", "key"), tmp_path / "mnt") as at:
            (at / "f").write_text("x")
        await api_of(house).commit("native", "base", "key")
        await api_of(house).prepare("native", "durable", "base")
    with unflushed_still(monkeypatch, NativeBackend):
        async with housed(tmp_path) as house:
            await api_of(house).prepare("native", "one", "base")
            await api_of(house).prepare("native", "empty")
            await api_of(house).view("native", "look", "base")
    for boot in ("two\n", "three\n"):
        reboot.write_text(boot)
        async with housed(tmp_path) as house:
            for call in (api_of(house).mounts("native", "one"), api_of(house).commit("native", "name", "one")):
                with pytest.raises(DataLoss, match="may lack data"):
                    await call
            for key in ("durable", "empty", "look"):
                assert await api_of(house).mounts("native", key)
    async with housed(tmp_path) as house:
        await api_of(house).remove("native", "one")
        assert await api_of(house).prepare("native", "one", "base")


async def test_where_other_directories_are_missing_it_was_not_the_power(tmp_path: Path, reboot: Path) -> None:
    trees = tmp_path / "root/snapshot/overlay/snapshots"
    async with housed(tmp_path) as house:
        await commit(house, tmp_path / "mnt")
    async with housed(tmp_path) as house:
        await api_of(house).prepare("overlay", "one", "base")
    for name in os.listdir(trees):
        shutil.rmtree(trees / name)
    reboot.write_text("two\n")
    async with housed(tmp_path):
        assert os.listdir(trees) == []


@contextmanager
def cut(disk: Path, at: Path) -> Iterator[Path]:
    """The disk as a power cut leaves it: what was not written to the device is not there."""
    image = at.with_suffix(".img")
    shutil.copyfile(disk.with_suffix(".img"), image)
    at.mkdir()
    subprocess.run(["mount", "-o", "loop", image, at], check=True)
    try:
        yield at
    finally:
        eventually(lambda: subprocess.run(["umount", at], check=False).returncode == 0, f"{at} stays busy")


@pytest.mark.parametrize("mode", ["background", "commit"])
async def test_a_power_cut(tmp_path: Path, reboot: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """The device's bytes are copied at the moment of the answer, and a service is started on the copy."""
    monkeypatch.setattr(syncer, "DELAY", 60.0)
    with small_disk(tmp_path / "disk", "64M") as disk:
        async with housed(disk, sync=mode) as house:
            for name in ("one", "two"):
                with mounted(await api_of(house).prepare("overlay", "key"), tmp_path / "mnt") as at:
                    for i in range(20):
                        (at / f"f{i}").write_text(str(i) * 3000)
                await api_of(house).commit("overlay", name, "key")
            with cut(disk, tmp_path / "cut") as after:
                reboot.write_text("two\n")
                async with housed(after, sync=mode) as revived:
                    infos = (await api_of(revived).walk("overlay")).items
                    for info in infos:
                        with mounted(await api_of(revived).view("overlay", "look", info.name), tmp_path / "mnt") as at:
                            assert tree(at) == {f"f{i}": str(i) * 3000 for i in range(20)}
                        await api_of(revived).remove("overlay", "look")
                    assert len(infos) == (2 if mode == "commit" else 0)
