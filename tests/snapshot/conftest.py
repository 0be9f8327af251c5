"""Fixtures of the snapshot service's own tests."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
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
