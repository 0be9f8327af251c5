"""Fixtures of the snapshot service's own tests."""

from __future__ import annotations

import secrets
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from grounds import btrfs_disk
from wherry_shared.bus import Bus
from wherry_shared.memory import MemoryTransport

sys.path.append(str(Path(__file__).parent))  # for snapshot_rig.py

from snapshot_rig import House


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(Bus(MemoryTransport(), node="n1"), tmp_path)
    await house.start()
    yield house
    await house.stop()


@pytest.fixture(scope="session")
def btrfs_ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    try:
        with btrfs_disk(tmp_path_factory.mktemp("ground") / "btrfs") as disk:
            yield disk
    except OSError as e:
        pytest.skip(str(e))


@pytest.fixture
def ground(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """An empty directory that a snapshotter can stand on."""

    def found(snapshotter: str) -> Path:
        if snapshotter != "btrfs":
            return tmp_path
        made: Path = request.getfixturevalue("btrfs_ground") / secrets.token_hex(8)
        made.mkdir()
        return made

    return found
