"""What every implementation of Leases must do, through its proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import rebuilt
from housebus import PATIENCE
from wherry_lease import metadata
from wherry_lease.leases import Registry
from wherry_lease.service import LeaseService, Sweeper
from wherry_shared import context
from wherry_shared.api.lease import EXPIRE_LABEL, RESOURCES_MAX, Leases, Resource
from wherry_shared.bus import Bus
from wherry_shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from wherry_shared.outbox import Outbox
from wherry_shared.sqlite import Database

BLOB = Resource(type="content", id=f"sha256:{'a' * 64}")
SNAPSHOT = Resource(type="snapshots/overlay", id="redis-rw")


class House(rebuilt.House):
    """A lease service on a bus, with a clock to turn, that can be built again on the same database."""

    def __init__(self, bus: Bus, root: Path) -> None:
        super().__init__(bus, root)
        self.time = datetime.now(UTC)

    async def start(self) -> None:
        self.database = await Database.open(self.root / "lease.db", metadata.MIGRATIONS)
        self.outbox = Outbox(self.database, self.bus)
        self.outbox.start()
        self.registry = Registry(metadata.Rows(self.database), clock=lambda: self.time)
        await self.bus.serve(LeaseService(self.registry))

    async def stop(self) -> None:
        await self.bus.drain()
        await self.outbox.stop()
        await self.database.close()

    def after(self, seconds: float) -> dict[str, str]:
        return {EXPIRE_LABEL: (self.time + timedelta(seconds=seconds)).isoformat()}

    def rows(self) -> tuple[int, ...]:
        """How many leases, resources and expiries are on disk."""
        tables = ("records", "resources", "expiries")
        return tuple(self.database.one(f"SELECT count(*) FROM {table}")[0] for table in tables)


@pytest.fixture
async def house(bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    async with House(bus, tmp_path) as house:
        yield house


@pytest.fixture
def leases(house: House) -> Leases:
    return house.bus.proxy(Leases, namespace="default")


async def test_what_is_created_can_be_got(house: House, leases: Leases) -> None:
    made = await leases.create("pull", {"a": "b", "empty": ""})
    assert (made.id, made.labels, made.created_at) == ("pull", {"a": "b"}, house.time)
    assert await leases.get("pull") == made


async def test_without_an_id_the_service_makes_one(leases: Leases) -> None:
    one, two = await asyncio.gather(leases.create(), leases.create())
    assert one.id != two.id
    assert one.id.partition("-")[0].isdigit()
    assert await leases.get(one.id) == one


@pytest.mark.parametrize("id", ["a\nb", " a", "a ", "\x00", "x" * 257])
async def test_an_id_must_fit_into_a_header(leases: Leases, id: str) -> None:
    with pytest.raises(InvalidArgument, match="lease id"):
        await leases.create(id)


async def test_an_id_is_taken_once_though_asked_for_twice_at_once(leases: Leases) -> None:
    outcomes = await asyncio.gather(*(leases.create("x", {"n": n}) for n in "12"), return_exceptions=True)
    assert sorted(type(o).__name__ for o in outcomes) == ["AlreadyExists", "Lease"]
    assert await leases.get("x") in outcomes


async def test_an_unknown_lease_is_not_found(leases: Leases) -> None:
    calls = (
        leases.get("nope"), leases.delete("nope"), leases.resources("nope"), leases.add_resource("nope", BLOB),
        leases.add_resources("nope", [BLOB]), leases.delete_resource("nope", BLOB),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(NotFound, match="lease 'nope': not found"):
            await call


async def test_what_a_lease_keeps(house: House, leases: Leases) -> None:
    await leases.create("a")
    await leases.create("b")
    image, ingest = Resource(type="images", id="redis"), Resource(type="ingests", id="layer-1")
    for resource in (SNAPSHOT, BLOB, ingest, image, BLOB):
        await leases.add_resource("a", resource)
    await leases.add_resource("b", BLOB)
    assert (await leases.resources("a")).items == [BLOB, image, ingest, SNAPSHOT]
    await leases.delete_resource("a", BLOB)
    await leases.delete_resource("a", BLOB)
    assert (await leases.resources("a")).items == [image, ingest, SNAPSHOT]
    assert (await leases.resources("b")).items == [BLOB]
    await leases.delete("a")
    assert house.rows() == (1, 1, 0)
    await leases.create("a")
    assert (await leases.resources("a")).items == []


async def test_several_at_once_are_kept_all_or_none(leases: Leases) -> None:
    await leases.create("a")
    image = Resource(type="images", id="redis")
    await leases.add_resources("a", [image, BLOB, image])
    await leases.add_resources("a", [BLOB])
    await leases.add_resources("a", [])
    assert (await leases.resources("a")).items == [BLOB, image]
    with pytest.raises(InvalidArgument, match="empty id"):
        await leases.add_resources("a", [SNAPSHOT, Resource(type="images", id="")])
    with pytest.raises(InvalidArgument, match=f"{RESOURCES_MAX}"):
        await leases.add_resources("a", [SNAPSHOT] * (RESOURCES_MAX + 1))
    assert (await leases.resources("a")).items == [BLOB, image]


@pytest.mark.parametrize(
    ("type", "id", "error"),
    [
        ("content", "sha256:zz", InvalidArgument),
        ("content", "", InvalidArgument),
        ("content/x", BLOB.id, InvalidArgument),
        ("images/x", "a", InvalidArgument),
        ("images", "", InvalidArgument),
        ("snapshots", "k", InvalidArgument),
        ("snapshots/", "k", InvalidArgument),
        ("snapshots/a/b", "k", InvalidArgument),
        ("snapshots/overlay", "", InvalidArgument),
        ("ingests", "", InvalidArgument),
        ("containers", "a", Unimplemented),
        ("", "a", Unimplemented),
    ],
)
async def test_a_bad_resource_is_refused(leases: Leases, type: str, id: str, error: type[Exception]) -> None:
    await leases.create("a")
    for change in (leases.add_resource, leases.delete_resource):
        with pytest.raises(error, match=r"resource|digest"):
            await change("a", Resource(type=type, id=id))
    assert (await leases.resources("a")).items == []


async def test_an_expired_lease_is_void_everywhere(house: House, leases: Leases) -> None:
    labels = house.after(60)
    await leases.create("short", labels)
    await leases.create("long")
    await leases.add_resource("short", BLOB)
    house.time += timedelta(seconds=59)
    assert (await leases.get("short")).labels == labels
    house.time += timedelta(seconds=1)
    calls = (
        leases.get("short"), leases.delete("short"), leases.resources("short"), leases.add_resource("short", BLOB),
        leases.add_resources("short", [BLOB]), leases.delete_resource("short", BLOB),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(NotFound):
            await call
    assert [lease.id for lease in (await leases.walk()).items] == ["long"]


async def test_an_expired_lease_gives_its_id_to_a_new_one(house: House, leases: Leases) -> None:
    await leases.create("x", house.after(1))
    await leases.add_resource("x", BLOB)
    house.time += timedelta(seconds=2)
    new = await leases.create("x", house.after(60))
    assert (await leases.get("x"), (await leases.resources("x")).items) == (new, [])
    with pytest.raises(AlreadyExists):
        await leases.create("x")
    assert await house.registry.sweep() == 0


async def test_the_sweep_removes_what_is_void(house: House, leases: Leases) -> None:
    other = house.bus.proxy(Leases, namespace="other")
    for number in range(300):
        await leases.create(f"short{number}", house.after(1))
    await other.create("short", house.after(1))
    await other.add_resource("short", BLOB)
    await leases.create("long", house.after(60))
    await leases.create("forever")
    await leases.add_resource("forever", BLOB)
    assert await house.registry.sweep() == 0
    house.time += timedelta(seconds=2)
    sweeper = Sweeper(house.registry, 0.01)
    sweeper.start()
    async with asyncio.timeout(PATIENCE):
        while house.rows() != (2, 1, 1):
            await asyncio.sleep(0.01)
    await sweeper.stop()
    assert [lease.id for lease in (await leases.walk()).items] == ["forever", "long"]


@pytest.mark.parametrize(
    "text", ["tomorrow", "2001-01-01", "2001-01-01T00:00:00", "2001-13-01T00:00:00Z", "20010101T000000Z", "1"]
)
async def test_an_expiry_that_cannot_be_parsed_keeps_the_lease(house: House, leases: Leases, text: str) -> None:
    made = await leases.create("x", {EXPIRE_LABEL: text})
    assert made.labels == {EXPIRE_LABEL: text}
    assert await leases.get("x") == made
    assert await house.registry.sweep() == 0


@pytest.mark.parametrize("text", ["2001-01-01T00:00:00Z", "2001-01-01T00:00:00.123456789+02:00"])
async def test_every_form_of_rfc_3339_expires(house: House, leases: Leases, text: str) -> None:
    await leases.create("x", {EXPIRE_LABEL: text})
    with pytest.raises(NotFound):
        await leases.get("x")
    assert await house.registry.sweep() == 1
    assert house.rows() == (0, 0, 0)


async def test_namespaces_do_not_see_each_other(house: House, leases: Leases) -> None:
    other = house.bus.proxy(Leases, namespace="other")
    await leases.create("x", {"a": "1"})
    await leases.add_resource("x", BLOB)
    with pytest.raises(NotFound):
        await other.get("x")
    await other.create("x", {"a": "2"})
    assert (await other.resources("x")).items == []
    await other.delete("x")
    assert (await leases.resources("x")).items == [BLOB]
    with pytest.raises(FailedPrecondition, match="namespace is required"):
        await house.bus.proxy(Leases).walk()


async def test_a_walk_has_pages_and_filters(house: House, leases: Leases) -> None:
    for number in range(9):
        await leases.create(f"l{number}", {"parity": str(number % 2), "a.b/c": "x"})
        await leases.create(f"m{number}", house.after(1))
    house.time += timedelta(seconds=2)
    page = await leases.walk(["labels.parity==0"], limit=3)
    assert ([lease.id for lease in page.items], page.next) == (["l0", "l2", "l4"], "l5")
    page = await leases.walk(["labels.parity==0"], after=page.next, limit=3)
    assert ([lease.id for lease in page.items], page.next) == (["l6", "l8"], "")
    assert [lease.id for lease in (await leases.walk(['id==l1,labels."a.b/c"'])).items] == ["l1"]
    with pytest.raises(InvalidArgument, match="position"):
        await leases.walk(["id=l"])


async def test_no_events_but_all_is_there_after_a_restart(house: House, leases: Leases) -> None:
    with context.use(key="k1"):
        made = await leases.create()
    with context.use(key="k2"):
        await leases.add_resource(made.id, BLOB)
    assert house.database.one("SELECT count(*) FROM outbox")[0] == 0
    await house.restart()
    assert await leases.get(made.id) == made
    assert (await leases.resources(made.id)).items == [BLOB]
    with context.use(key="k1"):
        assert await leases.create() == made
    with context.use(key="k2"):
        await leases.add_resource(made.id, BLOB)
    assert house.rows() == (1, 1, 0)
    with context.use(key="k3"):
        await leases.delete(made.id)
    await house.restart()
    with context.use(key="k3"):
        await leases.delete(made.id)
    with pytest.raises(NotFound):
        await leases.delete(made.id)
