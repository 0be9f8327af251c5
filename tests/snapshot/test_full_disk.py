"""On a full disk: making fails with ResourceExhausted and leaves nothing, removing works, and then making too."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from grounds import btrfs_disk
from node import eventually
from snapshot_rig import House, mounted, needs_root
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.bus import Bus
from wherry_shared.errors import ResourceExhausted
from wherry_shared.memory import MemoryTransport

pytestmark = needs_root


@pytest.fixture(params=["bytes", "inodes"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small ext4 of its own, short of bytes or of inodes."""
    image, at = tmp_path / "disk.img", tmp_path / "disk"
    with image.open("wb") as f:
        f.truncate(48 << 20)
    inodes = "200" if request.param == "inodes" else "8192"
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-N", inodes, "-O", "^has_journal", str(image)], check=True)
    at.mkdir()
    done = subprocess.run(["mount", "-o", "loop", str(image), str(at)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    yield at
    eventually(lambda: subprocess.run(["umount", at], check=False).returncode == 0, f"{at} stays busy")


@pytest.fixture
async def house(disk: Path, tmp_path: Path) -> AsyncIterator[House]:
    house = House(Bus(MemoryTransport(), node="n1"), disk)
    await house.start()
    yield house
    await house.stop()


def fill(disk: Path) -> None:
    """Take every byte and every inode that is left."""
    where = disk / "filler"
    where.mkdir(exist_ok=True)
    with suppress(OSError), (where / "bytes").open("ab", buffering=0) as f:
        for size in (1 << 20, 4096):
            with suppress(OSError):
                while True:
                    f.write(b"x" * size)
    with suppress(OSError):
        for i in range(20_000):
            os.close(os.open(where / f"i{i}", os.O_CREAT | os.O_WRONLY))


@pytest.mark.parametrize("snapshotter", ["overlay", "native", "erofs"])
async def test_a_full_disk(house: House, disk: Path, tmp_path: Path, snapshotter: str) -> None:
    await _fill_and_recover(house, disk, tmp_path, snapshotter)


async def test_a_full_btrfs(tmp_path: Path) -> None:
    """It has no inodes to run out of. Its pool is mounted where the backend's directories are."""
    (tmp_path / "root/snapshot").mkdir(parents=True)
    house = House(Bus(MemoryTransport(), node="n1"), tmp_path)
    try:
        with btrfs_disk(tmp_path / "root/snapshot/btrfs", 128 << 20) as disk:
            await house.start()
            try:
                await _fill_and_recover(house, disk, tmp_path, "btrfs")
            finally:
                await house.stop()
    except OSError as e:
        pytest.skip(str(e))


async def _fill_and_recover(house: House, disk: Path, tmp_path: Path, snapshotter: str) -> None:
    api = house.bus.proxy(Snapshots, namespace="default")
    with mounted(await api.prepare(snapshotter, "base-key"), tmp_path / "mnt") as at:
        for i in range(20):
            (at / f"f{i}").write_bytes(os.urandom(50_000))
    await api.commit(snapshotter, "base", "base-key")
    await api.prepare(snapshotter, "victim", "base")
    await api.cleanup(snapshotter)
    before = house.directories(snapshotter)
    fill(disk)
    for i in range(3):
        try:
            await api.prepare(snapshotter, f"new{i}", "base")
        except ResourceExhausted:
            continue
        assert snapshotter == "btrfs"  # a snapshot there takes nothing until it is written to
        await api.remove(snapshotter, f"new{i}")
    await api.cleanup(snapshotter)
    assert house.directories(snapshotter) == before
    assert [i.name for i in (await api.walk(snapshotter)).items] == ["base", "victim"]
    assert await api.mounts(snapshotter, "victim")
    await api.remove(snapshotter, "victim")
    await api.cleanup(snapshotter)
    assert len(house.directories(snapshotter)) == 1
    for path in (disk / "filler").iterdir():
        path.unlink()
    with mounted(await api.prepare(snapshotter, "new", "base"), tmp_path / "mnt") as at:
        assert len(list(at.iterdir())) == 20


async def test_a_database_without_room(house: House, disk: Path, request: pytest.FixtureRequest) -> None:
    """Rows that have no room any more: what is refused is not half there, and removals are not refused."""
    api = house.bus.proxy(Snapshots, namespace="default")
    labels = {f"l{i}": "x" * 4000 for i in range(20)}
    for i in range(5):
        await api.view("overlay", f"v{i}", labels=labels)
    fill(disk)
    refused = 0
    for i in range(5):
        try:
            await api.update("overlay", f"v{i}", {f"m{n}": "y" * 4000 for n in range(100)})
        except ResourceExhausted:
            refused += 1
    if "bytes" in request.node.name:  # short of inodes alone, rows still have their room
        assert refused
    with pytest.raises(ResourceExhausted):
        await api.view("overlay", "new", labels=labels)
    while infos := (await api.walk("overlay")).items:
        for info in infos:
            await api.remove("overlay", info.name)
    await api.cleanup("overlay")
    assert house.directories("overlay") == set()
