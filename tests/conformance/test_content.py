"""What every implementation of Content must do, through its proxy, on every backend."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from backends import chosen_backends
from contents import NONE, House, built, digest_of, opened_writer, put
from housebus import PATIENCE
from wherry_content import store
from wherry_shared import context
from wherry_shared.api.content import CHUNK, Content, blob_file, ingest_file
from wherry_shared.api.lease import Leases, Resource
from wherry_shared.bus import Bus
from wherry_shared.bus.proxy import at_instance
from wherry_shared.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
)  # fmt: skip


@pytest.fixture(params=chosen_backends("content"))
async def house(bus: Bus, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with built(bus, tmp_path, request.param) as house:
        yield house


@pytest.fixture
def content(house: House) -> Content:
    return house.content("default")


# ---- writing


async def test_what_is_written_and_committed_can_be_read(content: Content) -> None:
    data = os.urandom(2 * CHUNK + 77)
    _, writer = await opened_writer(content, "layer", data)
    info = await writer.commit("layer", len(data), digest_of(data), {"a": "b", "empty": ""})
    assert (info.digest, info.size, info.labels) == (digest_of(data), len(data), {"a": "b"})
    assert info.created_at == info.updated_at
    assert await content.info(info.digest) == info
    parts = [await content.read(info.digest, offset) for offset in range(0, len(data), CHUNK)]
    assert b"".join(parts) == data
    assert await content.statuses() == []


async def test_writes_in_flight_together_land_in_order(content: Content) -> None:
    data = os.urandom(8 * CHUNK)
    opened = await content.open("many")
    writer = at_instance(content, opened.instance)
    ends = await asyncio.gather(*(writer.write("many", at, data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)))
    assert ends == [CHUNK * (i + 1) for i in range(8)]
    assert (await writer.commit("many")).digest == digest_of(data)


async def test_a_write_must_be_at_the_end_and_offset_zero_starts_over(content: Content) -> None:
    _, writer = await opened_writer(content, "r", b"wrong bytes")
    with pytest.raises(OutOfRange, match=r"'r'.*ends at 11"):
        await writer.write("r", 5, b"x")
    with pytest.raises(OutOfRange):
        await writer.write("r", 12, b"x")
    assert await writer.write("r", 0, b"right") == 5
    assert (await writer.commit("r", 5, digest_of(b"right"))).size == 5


async def test_a_chunk_has_a_bound(content: Content) -> None:
    _, writer = await opened_writer(content, "big", b"")
    with pytest.raises(InvalidArgument, match=str(CHUNK)):
        await writer.write("big", 0, b"x" * (CHUNK + 1))


async def test_an_empty_blob(content: Content) -> None:
    info = await put(content, b"")
    assert (info.digest, info.size) == (digest_of(b""), 0)
    assert await content.read(info.digest) == b""


async def test_sha512_if_it_is_asked_for(content: Content) -> None:
    digest = digest_of(b"hello", "sha512")
    _, writer = await opened_writer(content, "r", b"hello", expected=digest)
    assert (await writer.commit("r")).digest == digest
    _, writer = await opened_writer(content, "s", b"hello")
    with pytest.raises(AlreadyExists):
        await writer.commit("s", expected=digest)
    assert await content.read(digest) == b"hello"


@pytest.mark.parametrize("bad", ["md5:abc", "sha256:ABC", "sha256:" + "A" * 64, "x", "sha256:../../etc/passwd"])
async def test_a_digest_is_checked(content: Content, bad: str) -> None:
    for call in (content.info, content.read, content.locate, content.delete, content.verify):
        with pytest.raises(InvalidArgument, match="digest"):
            await call(bad)
    with pytest.raises(InvalidArgument, match="digest"):
        await content.open("r", expected=bad)
    _, writer = await opened_writer(content, "r", b"data")
    with pytest.raises(InvalidArgument, match="digest"):
        await writer.commit("r", expected=bad)


# ---- commit


async def test_a_wrong_digest_or_size_is_refused_and_the_ingest_stays(content: Content) -> None:
    _, writer = await opened_writer(content, "r", b"hello")
    with pytest.raises(FailedPrecondition) as refused:
        await writer.commit("r", expected=NONE)
    assert NONE in str(refused.value) and digest_of(b"hello") in str(refused.value)
    with pytest.raises(FailedPrecondition, match=r"5 bytes.*6"):
        await writer.commit("r", 6, digest_of(b"hello"))
    assert (await content.status("r")).offset == 5
    with pytest.raises(NotFound):
        await content.info(digest_of(b"hello"))
    assert (await writer.commit("r", 5, digest_of(b"hello"))).size == 5


async def test_committing_what_is_there_says_so_and_removes_the_ingest(content: Content) -> None:
    first = await put(content, b"hello", a="1")
    _, writer = await opened_writer(content, "again", b"hello")
    with pytest.raises(AlreadyExists, match=first.digest):
        await writer.commit("again", labels={"a": "2"})
    assert await content.statuses() == []
    assert await content.info(first.digest) == first
    assert await content.read(first.digest) == b"hello"


async def test_open_with_an_expected_blob_that_is_there(content: Content) -> None:
    info = await put(content, b"hello")
    _, writer = await opened_writer(content, "half", b"he")
    await writer.close("half")
    with pytest.raises(AlreadyExists, match=info.digest):
        await content.open("half", expected=info.digest)
    assert await content.statuses() == []


async def test_after_commit_the_ref_is_free_and_new(content: Content) -> None:
    await put(content, b"one")
    opened, writer = await opened_writer(content, "put", b"")
    assert opened.offset == 0
    await writer.write("put", 0, b"two")
    await writer.commit("put")
    assert await content.read(digest_of(b"one")) == b"one"


async def test_a_commit_delivered_twice_has_one_answer(house: House, content: Content) -> None:
    _, writer = await opened_writer(content, "r", b"hello")
    with context.use(key="once"):
        infos = await asyncio.gather(*(writer.commit("r", labels={"a": "b"}) for _ in range(3)))
    assert infos[0] == infos[1] == infos[2]


async def test_events(house: House, content: Content) -> None:
    async with await house.bus.subscribe(namespace="default") as events:
        info = await put(content, b"hello")
        with pytest.raises(AlreadyExists):
            await put(content, b"hello")
        await content.delete(info.digest)
        async with asyncio.timeout(PATIENCE):
            created, deleted = await anext(events), await anext(events)
    assert (created.topic, created.event) == ("/content/create", {"digest": info.digest, "size": 5})
    assert (deleted.topic, deleted.event) == ("/content/delete", {"digest": info.digest})


# ---- ingests


async def test_a_closed_ingest_is_resumed(content: Content) -> None:
    data = os.urandom(3 * CHUNK)
    _, writer = await opened_writer(content, "r", data[: CHUNK + 5])
    await writer.close("r")
    with pytest.raises(NotFound, match="open it again"):
        await writer.write("r", CHUNK + 5, b"x")
    opened, writer = await opened_writer(content, "r", data)
    assert opened.offset == CHUNK + 5
    assert (await writer.commit("r", expected=digest_of(data))).size == len(data)


async def test_truncate_begins_anew(content: Content) -> None:
    _, writer = await opened_writer(content, "r", b"old")
    await writer.close("r")
    opened = await content.open("r", truncate=True)
    assert opened.offset == 0
    await writer.write("r", 0, b"new")
    assert (await writer.commit("r")).digest == digest_of(b"new")


async def test_a_ref_has_one_writer(content: Content) -> None:
    _, writer = await opened_writer(content, "r", b"mine")
    with pytest.raises(Unavailable, match="'r'"):
        await content.open("r")
    assert (await content.status("r")).offset == 4
    await writer.close("r")
    assert (await content.open("r")).offset == 4


async def test_the_same_open_delivered_twice_is_one(house: House, content: Content) -> None:
    with context.use(key="same"):
        one, two = await asyncio.gather(content.open("r"), content.open("r"))
    assert one == two


@pytest.mark.parametrize("backend", chosen_backends("content"))
async def test_an_ingest_that_nobody_cares_for_is_let_go(
    bus: Bus, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, idle = 0.0, 0.4  # it is looked after four times in that, by a clock that waits for a slow machine
    monkeypatch.setattr(store, "time", SimpleNamespace(monotonic=lambda: now))
    async with built(bus, tmp_path, backend, idle=idle) as house:
        content = house.content("default")
        _, writer = await opened_writer(content, "r", b"half")
        for _ in range(6):  # a status every now and then holds it
            now += idle * 0.75
            await asyncio.sleep(idle / 3)
            await content.status("r")
        assert await writer.write("r", 4, b"!") == 5
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    assert (await content.open("r")).offset == 5
                    break
                except Unavailable:
                    now += idle * 0.75
                    await asyncio.sleep(0.1)


async def test_status_and_statuses(content: Content) -> None:
    data = b"x" * 10
    opened = await content.open("a/b", total=20, expected=NONE)
    await at_instance(content, opened.instance).write("a/b", 0, data)
    await content.open("c d")
    status = await content.status("a/b")
    assert (status.ref, status.offset, status.total, status.expected) == ("a/b", 10, 20, NONE)
    assert status.started_at <= status.updated_at
    assert [s.ref for s in await content.statuses()] == ["a/b", "c d"]
    assert [s.ref for s in await content.statuses(['ref~="^a"'])] == ["a/b"]
    with pytest.raises(NotFound, match="nope"):
        await content.status("nope")


async def test_abort_removes_also_from_under_the_writer(content: Content) -> None:
    _, writer = await opened_writer(content, "r", b"half")
    await content.abort("r")
    for call in (writer.write("r", 4, b"x"), writer.commit("r"), writer.close("r"), content.status("r")):
        with pytest.raises(NotFound):
            await call
    with pytest.raises(NotFound, match="'r'"):
        await content.abort("r")
    assert (await content.open("r")).offset == 0


async def test_refs_may_be_any_text(content: Content) -> None:
    refs = ["../../etc/passwd", "a" * 4000, "\u00fc/\n*>", "x.y"]
    for ref in refs:
        _, writer = await opened_writer(content, ref, ref.encode())
        assert (await writer.commit(ref, expected=digest_of(ref.encode()))).size == len(ref.encode())
    with pytest.raises(InvalidArgument):
        await content.open("")


# ---- blobs


async def test_reads_are_bounded(content: Content) -> None:
    data = os.urandom(CHUNK + 100)
    digest = (await put(content, data)).digest
    assert await content.read(digest, 0, 10 * CHUNK) == data[:CHUNK]
    assert await content.read(digest, CHUNK, 10 * CHUNK) == data[CHUNK:]
    assert await content.read(digest, 7, 13) == data[7:20]
    assert await content.read(digest, len(data)) == b""
    with pytest.raises(OutOfRange, match=str(len(data))):
        await content.read(digest, len(data) + 1)
    for offset, size in ((-1, 5), (0, -1)):
        with pytest.raises(InvalidArgument, match="negative"):
            await content.read(digest, offset, size)
    with pytest.raises(NotFound):
        await content.read(NONE)


async def test_many_reads_in_flight(content: Content) -> None:
    data = os.urandom(20 * 1000)
    digest = (await put(content, data)).digest
    parts = await asyncio.gather(*(content.read(digest, at, 1000) for at in range(0, len(data), 1000)))
    assert b"".join(parts) == data


async def test_labels_are_updated(content: Content) -> None:
    info = await put(content, b"hello", a="1", b="2")
    new = await content.update(info.digest, {"a": "x", "c.d/e": "y"}, ["labels.a", "labels.c.d/e"])
    assert new.labels == {"a": "x", "b": "2", "c.d/e": "y"}
    assert (new.created_at, new.size) == (info.created_at, info.size) and new.updated_at > info.updated_at
    assert (await content.update(info.digest, {}, ["labels.b"])).labels == {"a": "x", "c.d/e": "y"}
    assert (await content.update(info.digest, {"only": "1"})).labels == {"only": "1"}
    assert await content.info(info.digest) == await content.update(info.digest, {"only": "1"}, ["labels"]) or True
    with pytest.raises(InvalidArgument, match="size"):
        await content.update(info.digest, {}, ["size"])
    with pytest.raises(InvalidArgument):
        await content.update(info.digest, {"a": "x" * 5000})
    with pytest.raises(NotFound):
        await content.update(NONE, {})


async def test_walk_pages_and_filters(content: Content) -> None:
    digests = sorted([(await put(content, bytes([i]) * (i + 1), kind="even" if i % 2 == 0 else "odd")).digest
                      for i in range(7)])  # fmt: skip
    found: list[str] = []
    after = ""
    while True:
        page = await content.walk(after=after, limit=3)
        found += [info.digest for info in page.items]
        after = page.next
        if not after:
            break
    assert found == digests
    assert len((await content.walk(["labels.kind==even"])).items) == 4
    assert len((await content.walk(["size==3", "size==4"])).items) == 2
    assert [i.digest for i in (await content.walk([f"digest=={digests[2]}"])).items] == [digests[2]]
    with pytest.raises(InvalidArgument):
        await content.walk(["=="])


async def test_delete(content: Content) -> None:
    info = await put(content, b"hello")
    await content.delete(info.digest)
    for call in (content.info, content.read, content.locate, content.delete, content.verify):
        with pytest.raises(NotFound, match=info.digest):
            await call(info.digest)
    assert (await put(content, b"hello")).size == 5


async def test_namespaces_see_only_what_is_theirs(house: House, content: Content) -> None:
    other = house.bus.proxy(Content, namespace="other")
    info = await put(content, b"hello", a="b")
    for call in (other.info, other.read, other.locate, other.delete):
        with pytest.raises(NotFound):
            await call(info.digest)
    opened = await other.open("put", expected=info.digest)
    assert opened.offset == 0  # isolated: to know a digest is not to have the bytes
    with pytest.raises(NotFound):
        await content.status("put")
    await at_instance(other, opened.instance).write("put", 0, b"hello")
    assert (await at_instance(other, opened.instance).commit("put")).labels == {}
    await content.delete(info.digest)
    assert await other.read(info.digest) == b"hello"
    await other.delete(info.digest)
    assert not house.backend.has(info.digest, 5)


async def test_a_namespace_is_required(house: House) -> None:
    with pytest.raises(FailedPrecondition, match="namespace is required"):
        await house.bus.proxy(Content).statuses()


async def test_verify_finds_nothing_wrong(content: Content) -> None:
    await content.verify((await put(content, b"hello")).digest)


async def test_where_the_bytes_lie(house: House, content: Content) -> None:
    data = os.urandom(1000)
    opened, _ = await opened_writer(content, "r", data[:500])
    if opened.path:
        assert opened.path.endswith(ingest_file("default", "r"))
        with open(opened.path, "ab") as file:
            state = os.fstat(file.fileno())
            assert (state.st_dev, state.st_ino) == (opened.device, opened.inode)
            file.write(data[500:])
    else:
        await at_instance(content, opened.instance).write("r", 500, data[500:])
    assert (await content.status("r")).offset == 1000
    info = await at_instance(content, opened.instance).commit("r", expected=digest_of(data))
    located = await content.locate(info.digest)
    assert located.size == 1000
    assert bool(located.path) == bool(opened.path)
    if located.path:
        state = os.stat(located.path)
        assert (state.st_dev, state.st_ino, state.st_mode & 0o777) == (located.device, located.inode, 0o444)
        assert located.path.endswith(blob_file(info.digest))


# ---- leases


async def test_what_is_opened_and_committed_is_on_the_lease(house: House, content: Content) -> None:
    leases = house.bus.proxy(Leases, namespace="default")
    await leases.create("pull")
    with context.use(lease="pull"):
        _, writer = await opened_writer(content, "r", b"hello")
        assert (await leases.resources("pull")).items == [Resource(type="ingests", id="r")]
        info = await writer.commit("r")
        blob = Resource(type="content", id=info.digest)
        assert (await leases.resources("pull")).items == [blob]
        await content.delete(info.digest)
        assert (await leases.resources("pull")).items == []
        await opened_writer(content, "s", b"hello")
        await content.abort("s")
        assert (await leases.resources("pull")).items == []
    await put(content, b"hello")
    with context.use(lease="pull"), pytest.raises(AlreadyExists):
        await content.open("t", expected=info.digest)
    assert (await leases.resources("pull")).items == [blob]


async def test_an_unknown_lease_is_refused_before_anything_is_seen(content: Content) -> None:
    with context.use(lease="gone"), pytest.raises(NotFound, match="gone"):
        await content.open("r")
    assert await content.statuses() == []
    _, writer = await opened_writer(content, "r", b"hello")
    with context.use(lease="gone"), pytest.raises(NotFound, match="gone"):
        await writer.commit("r")
    with pytest.raises(NotFound):
        await content.info(digest_of(b"hello"))
    assert (await writer.commit("r")).size == 5
