"""Rules of containerd's content store that the main suite does not tell already, on every backend."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from backends import chosen_backends
from contents import NONE, House, built, digest_of, opened_writer, put
from housebus import PATIENCE
from wherry_shared.api.content import CHUNK, Content, Opened
from wherry_shared.bus import Bus
from wherry_shared.bus.proxy import at_instance
from wherry_shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from wherry_shared.streams import BlobWriter


@pytest.fixture(params=chosen_backends("content"))
async def house(bus: Bus, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with built(bus, tmp_path, request.param) as house:
        yield house


@pytest.fixture
def content(house: House) -> Content:
    return house.content("default")


# ---- writers


async def test_of_many_openers_one_has_the_ref(content: Content) -> None:
    answers = await asyncio.gather(*(content.open("r") for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(answer, Opened) for answer in answers) == 1
    assert sum(isinstance(answer, Unavailable) for answer in answers) == 7


async def test_who_waits_gets_the_ref_when_it_is_free(content: Content) -> None:
    _, writer = await opened_writer(content, "r", b"one ")

    async def follow(data: bytes) -> int:
        async with BlobWriter(content, "r", local=False) as waiting:
            await waiting.write(data)
            return waiting.offset

    following = [asyncio.create_task(follow(data)) for data in (b"two ", b"two ")]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in following)
    await writer.close("r")
    async with asyncio.timeout(PATIENCE):
        assert sorted(await asyncio.gather(*following)) == [8, 12]
    assert (await content.status("r")).offset == 12


async def test_refs_of_two_namespaces_are_two(house: House, content: Content) -> None:
    other = house.content("other")
    await opened_writer(content, "r", b"mine")
    opened, _ = await opened_writer(other, "r", b"theirs")
    assert opened.offset == 0
    assert ((await content.status("r")).offset, (await other.status("r")).offset) == (4, 6)
    await other.abort("r")
    assert (await content.status("r")).offset == 4


async def test_sha512_is_resumed_as_such(content: Content) -> None:
    data = os.urandom(2 * CHUNK + 5)
    expected = digest_of(data, "sha512")
    _, writer = await opened_writer(content, "r", data[: CHUNK + 5], expected)
    await writer.close("r")
    opened, writer = await opened_writer(content, "r", data)  # what was announced once is known
    assert opened.offset == CHUNK + 5
    assert (await content.status("r")).expected == expected
    assert (await writer.commit("r", len(data))).digest == expected
    await content.verify(expected)


async def test_what_is_announced_is_checked_by_the_commit_alone(content: Content) -> None:
    opened = await content.open("r", total=3, expected=NONE)
    writer = at_instance(content, opened.instance)
    await writer.write("r", 0, b"hello")
    with pytest.raises(FailedPrecondition):
        await writer.commit("r", 3)
    with pytest.raises(FailedPrecondition):
        await writer.commit("r", 5, NONE)
    assert (await writer.commit("r")).digest == digest_of(b"hello")


async def test_a_refused_commit_can_be_written_on(content: Content) -> None:
    whole = b"hello world"
    _, writer = await opened_writer(content, "r", whole[:5])
    with pytest.raises(FailedPrecondition):
        await writer.commit("r", len(whole), digest_of(whole))
    assert await writer.write("r", 5, whole[5:]) == len(whole)
    assert (await writer.commit("r", len(whole), digest_of(whole))).size == len(whole)


async def test_a_refused_commit_survives_its_writer(content: Content) -> None:
    _, writer = await opened_writer(content, "r", b"hello")
    with pytest.raises(FailedPrecondition):
        await writer.commit("r", expected=NONE)
    await writer.close("r")
    opened = await content.open("r")
    assert opened.offset == 5
    assert (await at_instance(content, opened.instance).commit("r", 5, digest_of(b"hello"))).size == 5


async def test_an_existing_blob_ends_the_ingest_at_open_and_at_commit(content: Content) -> None:
    info = await put(content, b"hello")
    _, writer = await opened_writer(content, "late", b"hello")
    with pytest.raises(AlreadyExists):
        await writer.commit("late", 5, info.digest)
    with pytest.raises(NotFound):
        await content.status("late")
    with pytest.raises(NotFound):
        await writer.write("late", 5, b"!")
    with pytest.raises(AlreadyExists):
        await content.open("early", expected=info.digest)
    with pytest.raises(NotFound):
        await content.status("early")


async def test_an_abort_frees_the_ref_at_once(content: Content) -> None:
    _, writer = await opened_writer(content, "r", b"old")
    await content.abort("r")
    opened, again = await opened_writer(content, "r", b"new")
    assert opened.offset == 0
    assert (await again.commit("r")).digest == digest_of(b"new")
    with pytest.raises(NotFound):
        await writer.close("r")


# ---- status


async def test_progress(content: Content) -> None:
    opened = await content.open("r", total=10)
    writer = at_instance(content, opened.instance)
    first = await content.status("r")
    assert (first.offset, first.total, first.durable) == (0, 10, 0)
    await asyncio.sleep(0.02)
    await writer.write("r", 0, b"12345")
    second = await content.status("r")
    assert (second.offset, second.started_at) == (5, first.started_at)
    assert second.updated_at > first.updated_at and second.durable <= 5
    await writer.close("r")
    assert (await content.status("r")).offset == 5


async def test_ingests_are_filtered_by_ref(content: Content) -> None:
    for ref in ("layer-sha256:a", "layer-sha256:b", "config"):
        await content.open(ref)
    found = {tuple(i.ref for i in await content.statuses(f)) for f in (["ref==config"], ['ref~="^layer"'], ["ref!=x"])}
    assert found == {
        ("config",), ("layer-sha256:a", "layer-sha256:b"), ("config", "layer-sha256:a", "layer-sha256:b"),
    }  # fmt: skip
    assert [i.ref for i in await content.statuses(["ref==config", "ref==layer-sha256:b"])] == [
        "config", "layer-sha256:b",
    ]  # fmt: skip
    assert await content.statuses(["ref~=["]) == []  # a bad expression matches nothing
    with pytest.raises(InvalidArgument):
        await content.statuses(["ref=="])


# ---- labels


@pytest.mark.parametrize("key", ["k", "k" * 4000])
async def test_a_label_is_4096_bytes_with_its_key(content: Content, key: str) -> None:
    fits, more = "v" * (4096 - len(key)), "v" * (4097 - len(key))
    _, writer = await opened_writer(content, "r", b"hello")
    with pytest.raises(InvalidArgument, match="label"):
        await writer.commit("r", labels={key: more})
    info = await writer.commit("r", labels={key: fits})
    assert info.labels == {key: fits}
    with pytest.raises(InvalidArgument, match="label"):
        await content.update(info.digest, {key: more}, [f"labels.{key}"])
    umlauts = "\u00fc" * ((4096 - len(key)) // 2 + 1)  # bytes count, not characters
    with pytest.raises(InvalidArgument, match="label"):
        await content.update(info.digest, {key: umlauts})
    assert await content.info(info.digest) == info


async def test_an_empty_value_removes_a_label(content: Content) -> None:
    info = await put(content, b"hello", a="1", b="2")
    assert (await content.update(info.digest, {"a": ""}, ["labels.a"])).labels == {"b": "2"}
    assert (await content.update(info.digest, {"b": "", "c": "3"})).labels == {"c": "3"}
    assert (await content.update(info.digest, {"d": "4"}, ["labels.c", "labels.d"])).labels == {"d": "4"}


@pytest.mark.parametrize("path", ["size", "digest", "created_at", "label", "labels.", "Labels.a", ""])
async def test_nothing_but_labels_changes(content: Content, path: str) -> None:
    info = await put(content, b"hello", a="1")
    with pytest.raises(InvalidArgument):
        await content.update(info.digest, {"a": "2"}, [path])
    assert await content.info(info.digest) == info


# ---- lists


async def test_filters_on_blobs(content: Content) -> None:
    small = (await put(content, b"a", kind="config")).digest
    large = (await put(content, b"b" * 100, **{"containerd.io/gc.root": "x"})).digest
    expect = {
        f"digest=={small}": [small], "digest~=^sha256:": sorted([small, large]), "size==100": [large],
        "labels.kind": [small], "labels.kind==config": [small], "labels.kind!=config": [large],
        'labels."containerd.io/gc.root"==x': [large], 'labels."containerd.io/gc.root"': [large],
        "size==1,labels.kind==config": [small], "size==1,labels.kind==x": [], "nonsense==1": [],
    }  # fmt: skip
    for text, digests in expect.items():
        assert [info.digest for info in (await content.walk([text])).items] == digests, text
    assert [i.digest for i in (await content.walk(["size==1", "size==100"])).items] == sorted([small, large])


async def test_a_list_goes_on_behind_what_was_deleted(content: Content) -> None:
    digests = sorted([(await put(content, bytes([i]))).digest for i in range(6)])
    first = await content.walk(limit=3)
    assert [info.digest for info in first.items] == digests[:3]
    await content.delete(digests[2])
    await content.delete(digests[3])
    assert [info.digest for info in (await content.walk(after=first.next)).items] == digests[4:]
