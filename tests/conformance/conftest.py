"""The bus that every contract's suite runs on: in memory, over a real nats-server with the real permissions, and
some of them on the direct path beside it too."""

from __future__ import annotations

import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from backends import BackendName, chosen_backends
from grounds import btrfs_disk
from housebus import NODE, PATIENCE, HouseServer
from wherry_shared.bus import Bus, proxy
from wherry_shared.memory import MemoryTransport

sys.path.append(str(Path(__file__).parent))  # for toys.py, counting.py, contents.py, shelves.py
sys.path.append(str(Path(__file__).parent.parent / "snapshot"))  # for snapshot_rig.py

from shelves import Shelf
from snapshot_rig import House
from toys import Toy, Toys


@pytest.fixture(scope="session")
def house_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HouseServer]:
    """One nats-server for all suites; each test has connections of its own, and leaves no events behind."""
    with HouseServer(tmp_path_factory.mktemp("bus"), tenants=["default", "k8s", "k8s.io"]) as server:
        yield server


WAYS = ("memory", "nats")
ALL_WAYS = (*WAYS, "direct")
# The suites that run on the direct path too: the bus's own, and those of the services that are asked most.
DIRECT = {
    "test_bus", "test_bus_input", "test_container", "test_content", "test_image", "test_lease", "test_namespace",
    "test_task",
}  # fmt: skip


@pytest.fixture
async def bus(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bus]:
    """What a suite serves and calls on. Over NATS a service acts as its own user, and the callers are the admin."""
    if request.param == "memory":
        made: Bus = Bus(MemoryTransport(), node=NODE)
        yield made
        await made.close()
        return
    server: HouseServer = request.getfixturevalue("house_server")
    made = await server.bus(tmp_path if request.param == "direct" else None)
    yield made
    await made.close()
    await server.clean()


@pytest.fixture
async def toy(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The service of Toys, served. Its requests are counted: none is sent again because the machine stood still."""
    monkeypatch.setattr(proxy, "FIRST_ATTEMPT", PATIENCE)
    made = Toy()
    await bus.serve(made)
    return made


@pytest.fixture
def toys(bus: Bus) -> Toys:
    """Its proxy."""
    return bus.proxy(Toys, namespace="default")


@pytest.fixture(scope="session")
def btrfs_ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | str]:
    """A btrfs for all tests, or why there is none."""
    try:
        with btrfs_disk(tmp_path_factory.mktemp("ground") / "btrfs") as disk:
            yield disk
    except OSError as e:
        yield str(e)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bus" in metafunc.fixturenames and not hasattr(metafunc.module, "bus"):  # some have a bus of their own
        name = metafunc.module.__name__.rpartition(".")[2]
        metafunc.parametrize("bus", ALL_WAYS if name in DIRECT else WAYS, indirect=True)
    if "shelf" in metafunc.fixturenames:
        metafunc.parametrize("shelf", chosen_backends("snapshot"), indirect=True)


@pytest.fixture
async def shelf(request: pytest.FixtureRequest, bus: Bus, tmp_path: Path) -> AsyncIterator[Shelf]:
    """Each snapshotter, in a service of its own. A third party's may need --basetemp on a filesystem that it likes."""
    backend: BackendName = request.param
    root = tmp_path
    if backend == "btrfs":
        ground = request.getfixturevalue("btrfs_ground")
        if isinstance(ground, str):
            backend.refuse(ground)
        root = ground / secrets.token_hex(8)
        root.mkdir()
    house = House(bus, root)
    await house.start()
    plugin = house.plugin(backend)
    if "init_error" in plugin:
        await house.stop()
        backend.refuse(plugin["init_error"])
    yield Shelf(house, backend, frozenset(plugin["capabilities"]))
    await house.stop()
