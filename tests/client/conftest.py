"""A client of a whole house in memory, and a registry that does what it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from wherry.client import Client

from .image_house import house
from .registry_store import Store
from .registry_traps import Trap, serving


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with house(tmp_path / "house") as made:
        yield made


@pytest.fixture
async def store() -> Store:
    return Store()


@pytest.fixture
async def trap(store: Store) -> AsyncIterator[Trap]:
    async with serving(store.handle) as made:
        yield made
