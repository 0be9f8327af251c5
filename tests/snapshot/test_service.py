"""What is the service's own: slow work waits for nobody and nobody for it, and backends come from anywhere."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from snapshot_rig import House, mounted, needs_root
from wherry_shared import context
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.bus import Bus
from wherry_shared.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from wherry_shared.memory import MemoryTransport
from wherry_snapshot import backends
from wherry_snapshot.backends import Snapshot
from wherry_snapshot.backends.native import NativeBackend
from wherry_snapshot.backends.overlay import OverlayBackend

pytestmark = needs_root


@pytest.fixture
def api(house: House) -> Snapshots:
    return house.bus.proxy(Snapshots, namespace="default")


class Gate:
    """Holds the first call of a backend's method until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type[Any], name: str) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        original = getattr(owner, name)

        def held(*args: Any) -> Any:
            if not self.reached.is_set():
                self.reached.set()
                assert self._open.wait(60)
            return original(*args)

        monkeypatch.setattr(owner, name, held)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 60)

    def open(self) -> None:
        self._open.set()


async def test_a_long_removal_holds_nobody_up(house: House, api: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    await api.prepare("overlay", "big")
    gate = Gate(monkeypatch, OverlayBackend, "delete")
    try:
        await api.remove("overlay", "big")
        await gate.wait()
        assert any(d.startswith("rm-") for d in house.directories("overlay"))
        mounts = await api.prepare("overlay", "big")
        assert await api.mounts("overlay", "big") == mounts
        assert (await api.usage("overlay", "big")).inodes == 1
    finally:
        gate.open()
    await api.cleanup("overlay")
    assert len(house.directories("overlay")) == 1


async def test_what_nobody_waits_for_does_not_appear(
    house: House, api: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, OverlayBackend, "create")
    try:
        for patience in (0.3, 3.0, 30.0):  # it may not have come so far before that
            with context.use(timeout=patience), pytest.raises(DeadlineExceeded):
                await api.prepare("overlay", "late")
            if await asyncio.to_thread(gate.reached.wait, 1):
                break
        await gate.wait()
    finally:
        gate.open()
    await house.restart()
    with pytest.raises(NotFound):
        await api.stat("overlay", "late")
    await api.cleanup("overlay")
    assert house.directories("overlay") == set()


async def test_cleanup_spares_what_is_being_made(house: House, api: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, OverlayBackend, "fill")
    try:
        making = asyncio.create_task(api.prepare("overlay", "key"))
        await gate.wait()
        assert any(d.startswith("new-") for d in house.directories("overlay"))
        await api.cleanup("overlay")
    finally:
        gate.open()
    with mounted(await making, house.root / "mnt") as at:
        (at / "file").write_text("")


async def test_a_parent_that_goes_while_it_is_copied_was_not_found(
    house: House, api: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    await api.prepare("native", "key")
    await api.commit("native", "base", "key")
    gate = Gate(monkeypatch, NativeBackend, "create")
    try:
        making = asyncio.create_task(api.prepare("native", "child", "base"))
        await gate.wait()
        await api.remove("native", "base")
        await api.cleanup("native")
    finally:
        gate.open()
    with pytest.raises(NotFound, match="base"):
        await making
    await api.cleanup("native")
    assert house.directories("native") == set()


async def test_a_parent_that_is_replaced_meanwhile_is_not_mistaken(
    house: House, api: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def base() -> None:
        await api.prepare("overlay", "key")
        await api.commit("overlay", "base", "key")

    await base()
    gate = Gate(monkeypatch, OverlayBackend, "create")
    try:
        making = asyncio.create_task(api.prepare("overlay", "child", "base"))
        await gate.wait()
        await api.remove("overlay", "base")
        await base()
    finally:
        gate.open()
    with pytest.raises(Aborted, match="base"):
        await making
    await gone(house, "overlay", 1)


async def gone(house: House, snapshotter: str, left: int) -> None:
    """Wait, without asking for a cleanup, until only so many directories are left."""
    async with asyncio.timeout(60):
        while len(house.directories(snapshotter)) != left:
            await asyncio.sleep(0.01)


async def test_what_was_made_in_vain_goes_by_itself(house: House, api: Snapshots) -> None:
    calls = [api.prepare("overlay", "same") for _ in range(20)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(r, AlreadyExists) for r in results) == 19
    await gone(house, "overlay", 1)


async def test_orphans_go_at_the_start(house: House, api: Snapshots) -> None:
    await api.prepare("overlay", "key")
    await house.stop()
    for name in ("new-10", "rm-11", "12"):
        (house.root / "root/snapshot/overlay/snapshots" / name / "fs").mkdir(parents=True)
    await house.start()
    await gone(house, "overlay", 1)
    assert await api.mounts("overlay", "key")


class Rented(NativeBackend):
    """A snapshotter of another distribution."""

    def create(self, snapshot: Snapshot, check: backends.Check) -> None:
        super().create(snapshot, check)
        Path(self.tree(snapshot.number), "rented").touch()


class Broken:
    def __init__(self, root: Path, settings: Mapping[str, str]) -> None:
        raise FailedPrecondition("the moon is not full")


async def test_backends_come_from_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[EntryPoint]:
        values = {"rented": f"{__name__}:Rented", "broken": f"{__name__}:Broken", "gone": "no_such_module:Backend"}
        return [EntryPoint(name, value, group) for name, value in values.items()]

    monkeypatch.setattr(backends, "entry_points", points)
    house = House(Bus(MemoryTransport(), node="n1"), tmp_path)
    await house.start()
    try:
        api = house.bus.proxy(Snapshots, namespace="default")
        with mounted(await api.prepare("rented", "key"), tmp_path / "mnt") as at:
            assert (at / "rented").exists()
        with pytest.raises(InvalidArgument, match="moon"):
            await api.prepare("broken", "key")
        plugins = {p["id"]: p for p in json.loads(house.host.metadata["plugins"])}
        assert set(plugins) >= {"rented", "broken", "gone", "native", "overlay"}
        assert plugins["broken"]["init_error"] == "the moon is not full"
        assert "no_such_module" in plugins["gone"]["init_error"]
        assert "init_error" not in plugins["overlay"]
    finally:
        await house.stop()


async def test_a_directory_that_is_lost_is_told_of(house: House, api: Snapshots) -> None:
    mounts = await api.prepare("native", "key")
    Path(mounts[0].source).rmdir()
    with pytest.raises(DataLoss, match="missing"):
        await api.usage("native", "key")
    with pytest.raises(DataLoss, match="missing"):
        await api.commit("native", "name", "key")
    await api.remove("native", "key")
