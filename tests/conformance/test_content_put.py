"""`Content.put`: a small blob in one call has the rules of open, write and commit."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from backends import chosen_backends
from contents import House, built, digest_of
from wherry_shared import context
from wherry_shared.api.content import CHUNK, Content
from wherry_shared.api.lease import Leases, Resource
from wherry_shared.bus import Bus
from wherry_shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound


@pytest.fixture(params=chosen_backends("content"))
async def house(bus: Bus, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with built(bus, tmp_path, request.param) as house:
        yield house


@pytest.fixture
def content(house: House) -> Content:
    return house.bus.proxy(Content, namespace="default")


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_what_was_put_is_a_blob_and_nothing_else_is_left(
    house: House, content: Content, size: int, algorithm: str
) -> None:
    data = os.urandom(size)
    digest = digest_of(data, algorithm)
    info = await content.put(data, digest, {"a": "b", "none": ""})
    assert (info.digest, info.size, info.labels) == (digest, size, {"a": "b"})
    assert await content.info(digest) == info
    assert await content.read(digest) == data
    assert await content.statuses() == []
    ingests = house.root / "content" / "ingest"
    assert not ingests.exists() or list(ingests.iterdir()) == []


async def test_bytes_of_another_digest_and_too_many_are_refused(content: Content) -> None:
    wrong = digest_of(b"other")
    with pytest.raises(FailedPrecondition, match=wrong):
        await content.put(b"data", wrong)
    with pytest.raises(InvalidArgument):
        await content.put(b"data", "sha256:short")
    large = os.urandom(CHUNK + 1)
    with pytest.raises(InvalidArgument, match="more than"):
        await content.put(large, digest_of(large))
    assert (await content.walk()).items == []


async def test_a_blob_that_is_there_stays_as_it_is(content: Content, bus: Bus) -> None:
    digest = digest_of(b"data")
    first = await content.put(b"data", digest, {"a": "b"})
    with pytest.raises(AlreadyExists, match=digest):
        await content.put(b"data", digest, {"c": "d"})
    assert await content.info(digest) == first
    other = bus.proxy(Content, namespace="k8s")
    with pytest.raises(NotFound):
        await other.info(digest)
    await other.put(b"data", digest)
    await content.delete(digest)
    assert await other.read(digest) == b"data"


async def test_many_at_once_are_one_blob(content: Content) -> None:
    digest = digest_of(b"data")
    done = await asyncio.gather(*(content.put(b"data", digest) for _ in range(8)), return_exceptions=True)
    assert sum(not isinstance(one, BaseException) for one in done) == 1
    assert sum(isinstance(one, AlreadyExists) for one in done) == 7
    assert await content.read(digest) == b"data"


async def test_a_put_is_on_the_callers_lease_whether_it_was_there_or_not(house: House, content: Content) -> None:
    leases = house.bus.proxy(Leases, namespace="default")
    await content.put(b"old", digest_of(b"old"))
    lease = await leases.create()
    with context.use(lease=lease.id):
        await content.put(b"new", digest_of(b"new"))
        with pytest.raises(AlreadyExists):
            await content.put(b"old", digest_of(b"old"))
    kept = {Resource(type="content", id=digest_of(data)) for data in (b"old", b"new")}
    assert {(r.type, r.id) for r in (await leases.resources(lease.id)).items} == {(r.type, r.id) for r in kept}
    with context.use(lease="none"), pytest.raises(NotFound):
        await content.put(b"third", digest_of(b"third"))
    with pytest.raises(NotFound):
        await content.info(digest_of(b"third"))
    blobs = house.root / "content" / "blobs" / "sha256"
    assert not blobs.exists() or len(list(blobs.iterdir())) == 2
