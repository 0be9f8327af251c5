"""The bus that every contract's suite runs on: in memory, and over a real nats-server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from wherry_shared.bus import Bus
from wherry_shared.memory import MemoryTransport


@pytest.fixture(params=["memory"])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    made = Bus(MemoryTransport(), node="n1")
    yield made
    await made.close()
