"""What every implementation of Introspection must do, through its proxy.

Image and lease services are real ones; of the others, only what they tell of themselves is asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from housebus import HouseBus, HouseServer
from wherry_image import metadata as image_metadata
from wherry_image.catalog import Catalog
from wherry_image.service import ImageService
from wherry_introspection import service
from wherry_introspection.node import Node
from wherry_introspection.service import IntrospectionService
from wherry_lease import metadata as lease_metadata
from wherry_lease.leases import Registry
from wherry_lease.service import LeaseService
from wherry_shared.api import contracts, second_contracts
from wherry_shared.api.container import Containers
from wherry_shared.api.gc import Collections
from wherry_shared.api.introspection import Introspection
from wherry_shared.api.lease import Leases
from wherry_shared.bus import Bus
from wherry_shared.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable, Unimplemented
from wherry_shared.runtime import package_version
from wherry_shared.sqlite import Database

RUNTIME_TYPE, SHIM = "io.containerd.runtime.v2", "io.containerd.runc.v2"
OVERLAY = {
    "type": "io.containerd.snapshotter.v1", "id": "overlay", "capabilities": ["remap-ids"],
    "platforms": [{"os": "linux", "architecture": "amd64"}], "exports": {"root": "/r"},
}  # fmt: skip
BROKEN = {"type": "io.containerd.snapshotter.v1", "id": "btrfs", "init_error": "no btrfs"}
NAMES = [contract.service for contract in contracts()]


def refusing(contract: Any) -> Any:
    """A service that answers only to discovery."""

    async def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Unimplemented("only discovery is here")

    return type(f"Refusing{contract.__name__}", (contract,), dict.fromkeys(contract.endpoints, refuse))()


class House:
    """A whole node: every service in one process, image in two, each process with a connection of its own."""

    def __init__(self, bus: Bus, server: HouseServer | None, root: Path) -> None:
        self.bus, self.server, self.root = bus, server, root
        self.places: list[Bus] = []
        self.databases: list[Database] = []
        self.introspection = bus.proxy(Introspection)

    async def place(self, user: str) -> Bus:
        """One more process on the bus."""
        if self.server is None:
            return self.bus
        self.places.append(await self.server.connect(user))
        return self.places[-1]

    async def stranger(self) -> Any:
        """The transport of somebody who may do everything."""
        if self.server is None:
            return self.bus.transport
        transport = await self.server.operator()
        self.places.append(Bus(transport, node=self.bus.node))
        return transport

    async def introspect(self) -> None:
        own = await self.place("introspection")
        await own.serve(
            IntrospectionService(Node.open(self.root / "uuid", self.bus.node, self.root), own), instance="i1"
        )

    async def start(self) -> None:
        self.databases = [
            await Database.open(self.root / "image.db", image_metadata.MIGRATIONS),
            await Database.open(self.root / "lease.db", lease_metadata.MIGRATIONS),
        ]
        await self.introspect()
        for contract in contracts():
            if contract.service not in ("image", "introspection", "lease"):
                await (await self.place(contract.service)).serve(refusing(contract))
        leases = LeaseService(Registry(lease_metadata.Rows(self.databases[1])))
        await (await self.place("lease")).serve(leases, instance="l1")
        images = ImageService(
            Catalog(image_metadata.table(self.databases[0])), self.bus.proxy(Leases), self.bus.proxy(Collections)
        )
        for instance in ("m2", "m1"):
            plugins = json.dumps([OVERLAY, BROKEN])
            await (await self.place("image")).serve(images, instance=instance, metadata={"plugins": plugins})

    async def stop(self) -> None:
        """End every service; the caller's connection stays."""
        await self.bus.drain()
        for place in self.places:
            await place.close()
        for database in self.databases:
            await database.close()
        self.places, self.databases = [], []


@pytest.fixture
async def house(bus: Bus, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    server = request.getfixturevalue("house_server") if isinstance(bus, HouseBus) else None
    made = House(bus, server, tmp_path)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def introspection(house: House) -> Introspection:
    return house.introspection


async def test_the_node_tells_who_it_is(house: House, introspection: Introspection) -> None:
    told = await introspection.server()
    assert str(uuid.UUID(told.id)) == told.id
    assert (told.node, told.version) == (house.bus.node, package_version("wherry-introspection"))
    assert told.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert told.started_at.tzinfo is not None
    assert (told.pid, told.pid_namespace) == (os.getpid(), os.stat("/proc/self/ns/pid").st_ino)
    assert told.root == str(house.root)
    again = await introspection.server()
    assert told.time is not None and again.time is not None and again.time > told.time
    assert again.model_copy(update={"time": told.time}) == told


async def test_the_id_survives_restarts_and_the_start_does_not(house: House, introspection: Introspection) -> None:
    first = await introspection.server()
    await house.stop()
    await house.introspect()
    again = await introspection.server()
    assert again.id == first.id
    assert again.started_at > first.started_at


async def test_it_belongs_to_no_namespace(house: House) -> None:
    told = await house.bus.proxy(Introspection, namespace="default").server()
    assert told.id == (await house.introspection.server()).id


async def test_every_process_is_listed_with_its_statistics(house: House, introspection: Introspection) -> None:
    leases = house.bus.proxy(Leases, namespace="default")
    await leases.create("one")
    with pytest.raises(NotFound):
        await leases.get("two")
    found = await introspection.services()
    assert [s.name for s in found] == sorted([*NAMES, "image"])
    assert [s.id for s in found if s.name == "image"] == ["m1", "m2"]
    assert {s.pid for s in found} == {os.getpid()}
    versions = {contract.service: contract.version for contract in (*contracts(), *second_contracts())}
    assert {s.name: s.version for s in found} == {s.name: versions[s.name] for s in found}
    lease = next(s for s in found if s.name == "lease")
    assert (lease.id, lease.requests, lease.errors) == ("l1", 2, 1)
    assert lease.average_ns > 0
    assert lease.started_at
    assert 0 < lease.uptime < 120
    assert 0 < lease.pss <= lease.rss
    assert lease.rss == pytest.approx(resident(), rel=0.5)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_errors_are_counted_by_class_and_operation(house: House, introspection: Introspection) -> None:
    leases = house.bus.proxy(Leases, namespace="default")
    await leases.create("one")
    with pytest.raises(AlreadyExists):
        await leases.create("one")
    for _ in range(2):
        with pytest.raises(NotFound):
            await leases.get("two")
    lease = next(s for s in await introspection.services() if s.name == "lease")
    assert lease.error_codes == {"AlreadyExists": 1, "NotFound": 2}
    told = {e.name: (e.requests, e.errors, e.error_codes) for e in lease.endpoints if e.requests}
    assert told == {"create": (2, 1, {"AlreadyExists": 1}), "get": (2, 2, {"NotFound": 2})}
    assert set(told) < {e.name for e in lease.endpoints}
    assert all(e.average_ns > 0 for e in lease.endpoints if e.requests)
    assert lease.refused == {}


async def test_what_reaches_no_operation_is_counted_too(house: House, introspection: Introspection) -> None:
    transport = house.bus.transport
    subject = f"wherry.rpc.v1.{house.bus.node}.default.lease.no_such"
    await transport.request(subject, b"", timeout=5.0)
    lease = next(s for s in await introspection.services() if s.name == "lease")
    assert (lease.refused, lease.requests) == ({"Unimplemented": 1}, 0)


async def test_a_service_that_is_gone_is_said_to_be(house: House, introspection: Introspection) -> None:
    await house.stop()
    await house.introspect()
    assert [s.name for s in await introspection.services()] == ["introspection"]
    found = await introspection.plugins()
    assert [(p.type, p.id) for p in found] == [("io.wherry.service.v1", name) for name in NAMES]
    silent = {p.id for p in found if p.init_error == "it does not answer on the bus"}
    assert silent == {*NAMES} - {"introspection"}


async def test_plugins_are_told_once_and_in_order(introspection: Introspection) -> None:
    found = await introspection.plugins()
    assert [(p.type, p.id) for p in found] == [
        ("io.containerd.snapshotter.v1", "btrfs"),
        ("io.containerd.snapshotter.v1", "overlay"),
        *(("io.wherry.service.v1", name) for name in NAMES),
    ]
    broken, overlay, service = found[:3]
    assert broken.init_error == "no btrfs"
    assert overlay.model_dump(exclude_defaults=True) == OVERLAY
    assert service.exports == {"version": Containers.version}
    assert service.init_error == ""
    requires = {p.id: p.requires for p in found}
    assert requires["snapshot"] == ["io.wherry.service.v1.lease", "io.wherry.service.v1.events"]
    assert requires["container"] == ["io.wherry.service.v1.events"]


async def test_plugins_are_filtered(introspection: Introspection) -> None:
    async def ids(*filters: str) -> list[str]:
        return [p.id for p in await introspection.plugins(list(filters))]

    assert await ids("type==io.containerd.snapshotter.v1") == ["btrfs", "overlay"]
    assert await ids("type==io.containerd.snapshotter.v1,id==overlay", "id~=^im") == ["overlay", "image"]
    assert await ids("id!=image,type~=service") == [name for name in NAMES if name != "image"]
    assert await ids("exports.root") == []
    assert len(await ids("nothing", "")) == len(NAMES) + 2
    with pytest.raises(InvalidArgument, match="position"):
        await introspection.plugins(["id=x"])


@pytest.fixture
async def runtimes(house: House, tmp_path: Path) -> dict[str, Path]:
    """A second task process, which tells of runtimes as the real one does."""
    programs = {name: Path(found) for name in ("runc", "crun") if (found := shutil.which(name))}
    if found := shutil.which("containerd-shim-runc-v2"):
        programs[SHIM] = Path(found)
    programs["io.containerd.mute.v2"] = tmp_path / "mute"
    programs["io.containerd.loose.v2"] = tmp_path / "loose"
    for path, mode in ((tmp_path / "mute", 0o700), (tmp_path / "loose", 0o777)):
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(mode)
    programs["io.containerd.gone.v2"] = tmp_path / "nowhere"
    plugins = [{"type": RUNTIME_TYPE, "id": name, "exports": {"path": str(path)}} for name, path in programs.items()]
    contract = next(c for c in contracts() if c.service == "task")
    place = await house.place("task")
    await place.serve(refusing(contract), instance="t2", metadata={"plugins": json.dumps(plugins)})
    return programs


@pytest.mark.parametrize("name", ["runc", "crun"])
async def test_a_runtime_tells_its_version_and_features(
    introspection: Introspection, runtimes: dict[str, Path], name: str
) -> None:
    if name not in runtimes:
        pytest.skip(f"{name} is not installed")
    told = await introspection.runtime(name)
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
    assert told.version and told.revision
    assert f"version {told.version}" in said and f"commit: {told.revision}" in said
    assert told.path == str(runtimes[name])
    asked = subprocess.run([name, "features"], capture_output=True, text=True, check=False)
    assert told.features == (json.loads(asked.stdout) if asked.returncode == 0 else {})
    assert await introspection.runtime(name) == told


async def test_a_shim_tells_its_version(introspection: Introspection, runtimes: dict[str, Path]) -> None:
    if SHIM not in runtimes:
        pytest.skip("no shim v2 is installed")
    told = await introspection.runtime(SHIM)
    said = subprocess.run([runtimes[SHIM], "-v"], capture_output=True, text=True, check=True).stdout
    assert told.version and told.version in said and told.revision in said
    assert told.features == {}


async def test_a_runtime_that_cannot_be_asked_says_why(introspection: Introspection, runtimes: dict[str, Path]) -> None:
    with pytest.raises(NotFound, match="none that the task service tells of"):
        await introspection.runtime("youki")
    with pytest.raises(NotFound, match="No such file"):
        await introspection.runtime("io.containerd.gone.v2")
    with pytest.raises(NotFound, match="can be changed by others"):
        await introspection.runtime("io.containerd.loose.v2")
    with pytest.raises(Unavailable, match="does not tell its version"):
        await introspection.runtime("io.containerd.mute.v2")


async def test_other_nodes_and_strangers_on_the_bus_are_left_out(house: House, introspection: Introspection) -> None:
    """Another node shares the bus in a cluster, and any NATS micro service answers to the same discovery."""
    transport = await house.stranger()

    def answer(message: Any) -> None:
        for stranger in ({"name": "theirs", "metadata": None}, {"name": "image", "metadata": {"node": "n2"}}, "text"):
            transport.publish(message.reply, json.dumps(stranger).encode())

    subscriptions = [await transport.subscribe(f"$SRV.{verb}", answer) for verb in ("INFO", "STATS")]
    await transport.flush()
    assert len(await introspection.services()) == len(NAMES) + 1
    assert len(await introspection.plugins()) == len(NAMES) + 2
    for subscription in subscriptions:
        await subscription.unsubscribe()


async def test_more_processes_than_services_are_all_listed(
    house: House, introspection: Introspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled services, and nobody knows how far: the list is not complete when there are as many as services."""
    transport = await house.stranger()
    more = [f"c{n:02}" for n in range(20)]
    told = asyncio.Event()

    async def one_by_one(reply: str) -> None:
        for instance in more:
            answer = {"name": "content", "id": instance, "metadata": {"node": house.bus.node}}
            transport.publish(reply, json.dumps(answer).encode())
            await asyncio.sleep(0)
        told.set()

    tasks: list[asyncio.Task[None]] = []

    def on_request(message: Any) -> None:
        tasks.append(asyncio.get_running_loop().create_task(one_by_one(message.reply)))

    subscription = await transport.subscribe("$SRV.STATS", on_request)
    await transport.flush()
    for seconds in (service.QUICK, 1.0, 10.0):  # on a busy machine they may come later
        monkeypatch.setattr(service, "QUICK", seconds)
        told.clear()
        found = await introspection.services()
        if told.is_set():
            break
    assert told.is_set()
    assert [s.id for s in found if s.id in more] == more
    await subscription.unsubscribe()
