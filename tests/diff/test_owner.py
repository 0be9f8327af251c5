"""Whose mounts they are: a tenant may have layers applied to, and made of, what its own snapshots show."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
from wherry_diff.limits import Limits
from wherry_diff.pool import Pool
from wherry_diff.service import DiffService
from wherry_shared import context
from wherry_shared.api.content import Content
from wherry_shared.api.snapshot import Info, Snapshots
from wherry_shared.bus import Bus
from wherry_shared.context import Identity
from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unimplemented
from wherry_shared.memory import MemoryTransport
from wherry_shared.values import Descriptor, Mount, Page

MANY = 2500
LAYER = Descriptor(media_type="application/vnd.oci.image.layer.v1.tar", digest="sha256:" + "0" * 64, size=1)


class Shelf(Snapshots):
    """So many snapshots that a walk has pages; every third is a view, some are gone when their mounts are asked for."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self.asked = 0

    async def walk(self, snapshotter: str, filters: list[str] = [], after: str = "", limit: int = 1000) -> Page[Info]:  # noqa: B006
        if snapshotter != "native":
            raise InvalidArgument(f"no snapshotter {snapshotter}")
        started = datetime(2026, 1, 1, tzinfo=UTC)
        kinds = {f.partition("==")[2] for f in filters}
        found = [
            Info(
                kind=kind, name=f"s{n:05}", created_at=started + timedelta(seconds=n), updated_at=started,
            )
            for n in range(MANY)
            if (kind := "view" if n % 3 == 0 else "active") in kinds and f"s{n:05}" > after
        ]  # fmt: skip
        return Page(items=found[:limit], next=found[limit - 1].name if len(found) > limit else "")

    async def mounts(self, snapshotter: str, key: str) -> list[Mount]:
        self.asked += 1
        if key.endswith("7"):
            raise FailedPrecondition("committed meanwhile")
        return self.of(int(key[1:]))

    def of(self, number: int) -> list[Mount]:
        return [Mount(type="bind", source=str(self.at / str(number)), options=["ro" if number % 3 == 0 else "rw"])]


async def _refuse(self: Shelf, *arguments: Any, **named: Any) -> NoReturn:
    raise Unimplemented("only looked at")


for _name in Snapshots.endpoints.keys() - vars(Shelf).keys():
    setattr(Shelf, _name, _refuse)


@pytest.fixture
async def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.fixture
async def diff(shelf: Shelf, tmp_path: Path) -> AsyncIterator[DiffService]:
    bus = Bus(MemoryTransport(), node="n")
    await bus.serve(shelf)
    spool = tmp_path / "spool"
    spool.mkdir()
    pool = Pool(1, spool)
    context.enter(context.Context(namespace="mine", identity=Identity("tenant-mine", "tenant", "mine")))
    yield DiffService(bus.proxy(Content), bus.proxy(Snapshots), pool, Limits(), spool)
    pool.close()
    await bus.close()


@pytest.mark.parametrize("number", [1, 1000, MANY - 1])
async def test_every_snapshot_of_its_own_is_found(diff: DiffService, shelf: Shelf, number: int) -> None:
    for each in (number, number - number % 3):
        with pytest.raises(NotFound, match="mount of"):  # its directory: so the mounts themselves were let pass
            await diff.changes([], shelf.of(each))


async def test_the_newest_are_asked_first(diff: DiffService, shelf: Shelf) -> None:
    with pytest.raises(NotFound):
        await diff.changes([], shelf.of(MANY - 2))
    assert shelf.asked < 100


async def test_what_is_nobodys_or_no_longer_is_refused(diff: DiffService, shelf: Shelf) -> None:
    etc = [Mount(type="bind", source="/etc", options=["ro"])]
    for left, right in (([], etc), (etc, shelf.of(1)), ([], shelf.of(1) + etc), ([], shelf.of(7))):
        with pytest.raises(PermissionDenied):
            await diff.changes(left, right)
        with pytest.raises(PermissionDenied):
            await diff.compare(left, right)
    for mounts in (etc, shelf.of(3)):  # a view is not to be written to, whatever its options say
        with pytest.raises(PermissionDenied):
            await diff.apply(LAYER, mounts)
