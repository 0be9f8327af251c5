"""The bus that every contract's suite runs on: in memory, and over a real nats-server with the real permissions."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from housebus import NODE, HouseServer
from wherry_shared.bus import Bus
from wherry_shared.memory import MemoryTransport

sys.path.append(str(Path(__file__).parent))  # for toys.py and counting.py

from toys import Toy, Toys


@pytest.fixture(scope="session")
def house_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HouseServer]:
    """One nats-server for all suites; each test has connections of its own, and leaves no events behind."""
    with HouseServer(tmp_path_factory.mktemp("bus"), tenants=["default", "k8s", "k8s.io"]) as server:
        yield server


@pytest.fixture(params=["memory", "nats"])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    """What a suite serves and calls on. Over NATS a service acts as its own user, and the callers are the admin."""
    if request.param == "memory":
        made: Bus = Bus(MemoryTransport(), node=NODE)
        yield made
        await made.close()
        return
    server: HouseServer = request.getfixturevalue("house_server")
    made = await server.bus()
    yield made
    await made.close()
    await server.clean()


@pytest.fixture
async def toy(bus: Bus) -> Toy:
    """The service of Toys, served."""
    made = Toy()
    await bus.serve(made)
    return made


@pytest.fixture
def toys(bus: Bus) -> Toys:
    """Its proxy."""
    return bus.proxy(Toys, namespace="default")
