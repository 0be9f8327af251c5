"""What one namespace may have of another's blobs: containerd's sharing policies, on every backend."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from backends import chosen_backends
from contents import House, built, digest_of, opened_writer, put
from wherry_content import sharing
from wherry_content.sharing import Policy
from wherry_shared import context
from wherry_shared.api.content import CHUNK, Content
from wherry_shared.api.lease import Leases, Resource
from wherry_shared.api.namespace import Namespaces
from wherry_shared.bus import Bus
from wherry_shared.bus.proxy import at_instance
from wherry_shared.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound, OutOfRange
from wherry_shared.streams import BlobWriter, write_blob

DATA = os.urandom(CHUNK + 1000)
DIGEST = digest_of(DATA)


@pytest.fixture(params=chosen_backends("content"))
async def shared(bus: Bus, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with built(bus, tmp_path, request.param, Policy.shared) as house:
        await put(house.content("default"), DATA, a="b")
        yield house


@pytest.fixture(params=chosen_backends("content"))
async def isolated(bus: Bus, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with built(bus, tmp_path, request.param) as house:
        await put(house.content("default"), DATA, a="b")
        yield house


@pytest.fixture
def other(shared: House) -> Content:
    return shared.content("other")


async def test_a_blob_of_another_namespace_needs_no_bytes(shared: House, other: Content) -> None:
    opened = await other.open("r", expected=DIGEST)
    assert (opened.offset, opened.complete, opened.path) == (len(DATA), True, "")
    status = await other.status("r")
    assert (status.offset, status.expected, (await other.statuses())[0].offset) == (len(DATA), DIGEST, len(DATA))
    with pytest.raises(NotFound):
        await other.info(DIGEST)  # not before it is committed
    info = await at_instance(other, opened.instance).commit("r", len(DATA), DIGEST, {"c": "d"})
    assert (info.digest, info.size, info.labels) == (DIGEST, len(DATA), {"c": "d"})
    assert await other.read(DIGEST) == DATA[:CHUNK]
    assert await other.statuses() == []
    await shared.content("default").delete(DIGEST)
    assert await other.read(DIGEST, CHUNK) == DATA[CHUNK:]


@pytest.mark.parametrize("total", [0, len(DATA), len(DATA) + 1])
async def test_the_size_must_be_unknown_or_right(other: Content, total: int) -> None:
    opened = await other.open("r", total=total, expected=DIGEST)
    assert opened.complete is (total in (0, len(DATA)))
    assert opened.offset == (len(DATA) if opened.complete else 0)


async def test_without_an_expected_digest_everything_is_sent(other: Content) -> None:
    opened, writer = await opened_writer(other, "r", DATA)
    assert not opened.complete
    assert (await writer.commit("r", expected=DIGEST)).size == len(DATA)


async def test_what_is_written_goes_behind_a_copy(shared: House, other: Content) -> None:
    opened = await other.open("r", expected=DIGEST)
    writer = at_instance(other, opened.instance)
    with pytest.raises(OutOfRange, match=str(len(DATA))):
        await writer.write("r", 7, b"x")
    assert await writer.write("r", len(DATA), b"") == len(DATA)
    assert await writer.write("r", len(DATA), b"more") == len(DATA) + 4
    assert (await other.status("r")).offset == len(DATA) + 4
    with pytest.raises(FailedPrecondition):
        await writer.commit("r", expected=DIGEST)
    longer = DATA + b"more"
    assert (await writer.commit("r", len(longer), digest_of(longer))).size == len(longer)
    assert await other.read(digest_of(longer), CHUNK) == longer[CHUNK:]
    assert await shared.content("default").read(DIGEST, CHUNK) == DATA[CHUNK:]
    await shared.content("default").verify(DIGEST)


async def test_offset_zero_starts_over(other: Content) -> None:
    opened = await other.open("r", expected=DIGEST)
    writer = at_instance(other, opened.instance)
    assert await writer.write("r", 0, b"else") == 4
    assert (await writer.commit("r", 4, digest_of(b"else"))).size == 4


async def test_a_wrong_commit_keeps_the_ingest(other: Content) -> None:
    opened = await other.open("r", expected=DIGEST)
    writer = at_instance(other, opened.instance)
    with pytest.raises(FailedPrecondition, match="bytes"):
        await writer.commit("r", 5)
    with pytest.raises(FailedPrecondition, match="digest"):
        await writer.commit("r", expected=digest_of(b"x"))
    assert (await writer.commit("r")).digest == DIGEST


async def test_it_is_resumed_as_it_was(shared: House, other: Content) -> None:
    opened = await other.open("r", expected=DIGEST)
    await at_instance(other, opened.instance).close("r")
    again = await other.open("r", expected=DIGEST)
    assert (again.offset, again.complete) == (len(DATA), True)
    await at_instance(other, again.instance).close("r")
    await shared.content("default").delete(DIGEST)
    last = await other.open("r", expected=DIGEST)
    assert (last.offset, last.complete, (await other.status("r")).offset) == (0, False, 0)


async def test_truncate_insists_on_sending(other: Content) -> None:
    opened = await other.open("r", expected=DIGEST, truncate=True)
    assert (opened.offset, opened.complete) == (0, False)


async def test_a_blob_that_goes_meanwhile(shared: House, other: Content) -> None:
    opened = await other.open("r", expected=DIGEST)
    await shared.content("default").delete(DIGEST)
    with pytest.raises(Aborted, match=DIGEST):
        await at_instance(other, opened.instance).commit("r", expected=DIGEST)
    with pytest.raises(NotFound):
        await other.info(DIGEST)
    await at_instance(other, opened.instance).write("r", 0, DATA[:CHUNK])
    await at_instance(other, opened.instance).write("r", CHUNK, DATA[CHUNK:])
    assert (await at_instance(other, opened.instance).commit("r", expected=DIGEST)).digest == DIGEST


async def test_an_own_blob_is_told_as_ever(shared: House) -> None:
    with pytest.raises(AlreadyExists):
        await shared.content("default").open("r", expected=DIGEST)


async def test_it_is_on_the_lease(shared: House, other: Content) -> None:
    leases = shared.bus.proxy(Leases, namespace="other")
    await leases.create("pull")
    with context.use(lease="pull"):
        opened = await other.open("r", expected=DIGEST)
        assert (await leases.resources("pull")).items == [Resource(type="ingests", id="r")]
        await at_instance(other, opened.instance).commit("r")
    assert (await leases.resources("pull")).items == [Resource(type="content", id=DIGEST)]


async def test_a_writer_sends_nothing(shared: House, other: Content) -> None:
    before = shared.requests("write")
    assert before > 0
    info = await write_blob(other, "r", DATA, size=len(DATA), expected=DIGEST, local=False)
    assert (info.size, shared.requests("write")) == (len(DATA), before)
    async with BlobWriter(shared.content("third"), "r", expected=DIGEST) as writer:
        assert writer.complete and writer.offset == len(DATA) and not writer.is_local
        assert (await writer.commit()).digest == DIGEST
    assert shared.requests("write") == before


# ---- isolated, which is the default


async def test_isolated_shares_nothing(isolated: House) -> None:
    opened = await isolated.content("other").open("r", expected=DIGEST)
    assert (opened.offset, opened.complete) == (0, False)


async def test_isolated_shares_what_is_labelled(isolated: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "CACHED_SECONDS", 0.0)
    namespaces, other = isolated.bus.proxy(Namespaces), isolated.content("other")
    await namespaces.create("default", {sharing.SHAREABLE: "yes"})
    opened = await other.open("r", expected=DIGEST)
    assert not opened.complete
    await at_instance(other, opened.instance).close("r")
    await namespaces.update("default", {sharing.SHAREABLE: "true"})
    opened = await other.open("r", expected=DIGEST)
    assert opened.complete and opened.offset == len(DATA)
    assert (await at_instance(other, opened.instance).commit("r")).size == len(DATA)
    # What `other` has by sharing, it does not hand on: its own label is what counts.
    await isolated.content("default").delete(DIGEST)
    assert not (await isolated.content("third").open("r", expected=DIGEST)).complete


async def test_without_the_namespace_service_nothing_is_shared(
    isolated: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "PATIENCE", 0.1)
    await isolated.bus.proxy(Namespaces).create("default", {sharing.SHAREABLE: "true"})
    await isolated.namespaces.drain()
    assert not (await isolated.content("other").open("r", expected=DIGEST)).complete
