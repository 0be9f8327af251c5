"""A damaged database: the service refuses to start, and from a backup it goes on without losing a directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from snapshot_rig import House, mounted, needs_root, tree
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.backup import Backup
from wherry_shared.bus import Bus
from wherry_shared.errors import DataLoss, FailedPrecondition, NotFound
from wherry_shared.memory import MemoryTransport

pytestmark = needs_root


def housed(root: Path, **options: str) -> House:
    return House(Bus(MemoryTransport(), node="n1"), root, options)


def api_of(house: House) -> Snapshots:
    return house.bus.proxy(Snapshots, namespace="default")


async def layer(house: House, name: str) -> None:
    with mounted(await api_of(house).prepare("overlay", "key"), house.root / "mnt") as at:
        (at / "name").write_text(name)
    await api_of(house).commit("overlay", name, "key")


async def furnished(root: Path) -> None:
    """`old` is in the backup with `gone`, which was removed after it; `new` came later."""
    house = housed(root)
    await house.start()
    await layer(house, "old")
    await layer(house, "gone")
    keeper = Backup(root / "root/snapshot/metadata.db")
    keeper.copy()
    keeper.close()
    kept = (root / "root/snapshot/metadata.db.backup").read_bytes()
    await api_of(house).remove("overlay", "gone")
    await api_of(house).cleanup("overlay")
    await layer(house, "new")
    await house.stop()
    (root / "root/snapshot/metadata.db.backup").write_bytes(kept)  # as if it had not come to the one at the end


@pytest.mark.parametrize("many", [False, True], ids=["within a block of numbers", "beyond it"])
async def test_a_restored_database_may_be_older(tmp_path: Path, many: bool) -> None:
    await furnished(tmp_path)
    at = tmp_path / "root/snapshot"
    if many:
        house = housed(tmp_path)
        await house.start()
        for i in range(130):
            await api_of(house).prepare("overlay", f"more{i}")
        kept = (at / "metadata.db.backup").read_bytes()
        await house.stop()
        (at / "metadata.db.backup").write_bytes(kept)
    before = {p.name for p in (at / "overlay/snapshots").iterdir()}
    os.truncate(at / "metadata.db", (at / "metadata.db").stat().st_size // 2)
    with pytest.raises(DataLoss, match="restore=backup"):
        await housed(tmp_path).start()
    assert {p.name for p in (at / "overlay/snapshots").iterdir()} == before
    house = housed(tmp_path, restore="backup")
    await house.start()
    api = api_of(house)
    await api.cleanup("overlay")
    with mounted(await api.view("overlay", "look", "old"), tmp_path / "mnt") as root:
        assert tree(root) == {"name": "old"}
    with pytest.raises(NotFound):
        await api.stat("overlay", "new")
    lost = [p for p in (at / "overlay/snapshots").iterdir() if p.name.startswith("lost-")]
    assert len(lost) == (131 if many else 1)
    assert "new" in [(p / "fs/name").read_text() for p in lost if (p / "fs/name").exists()]
    await api.remove("overlay", "gone")  # its directory is not there any more
    mounts = await api.prepare("overlay", "next")
    assert int(Path(mounts[0].source).parent.name) > max(int(n) for n in before if n.isdigit())
    await house.stop()
    house = housed(tmp_path)  # and without the setting all is as ever
    await house.start()
    await api_of(house).cleanup("overlay")
    assert all(p.exists() for p in lost)
    await house.stop()


async def test_an_older_database_put_there_by_hand_is_still_refused(tmp_path: Path) -> None:
    await furnished(tmp_path)
    at = tmp_path / "root/snapshot"
    house = housed(tmp_path)
    await house.start()
    for i in range(130):
        await api_of(house).prepare("overlay", f"more{i}")
    kept = (at / "metadata.db.backup").read_bytes()
    await house.stop()
    (at / "metadata.db").write_bytes(kept)
    for leftover in at.glob("metadata.db-*"):
        leftover.unlink()
    with pytest.raises(FailedPrecondition, match="restore=backup"):
        await housed(tmp_path).start()
    house = housed(tmp_path, restore="backup")
    await house.start()
    assert [i.name for i in (await api_of(house).walk("overlay")).items] == ["gone", "old"]
    await house.stop()
