"""Several replicas on one root, in one queue group."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from contentd import Replica, digest_of
from descriptors import descriptors
from housebus import PATIENCE
from wherry_content import store
from wherry_shared.api.content import CHUNK
from wherry_shared.bus.proxy import at_instance
from wherry_shared.errors import AlreadyExists, NotFound, Unavailable
from wherry_shared.streams import read_blob, write_blob

DATA = os.urandom(6 * CHUNK)
DIGEST = digest_of(DATA)

Start = Callable[..., Awaitable[Replica]]


async def test_every_replica_serves_what_one_of_them_took(start: Start) -> None:
    one, two = await start("one"), await start("two")
    content = one.content
    assert (await write_blob(content, "r", DATA, expected=DIGEST, local=False)).size == len(DATA)
    for _ in range(8):
        assert b"".join([c async for c in read_blob(content, DIGEST, local=False)]) == DATA
    assert one.requests("read") and two.requests("read")


async def test_a_deletion_counts_for_all_and_frees_the_bytes(start: Start) -> None:
    one, _ = await start("one"), await start("two", idle=0.2)
    at_one, at_two = at_instance(one.content, "one"), at_instance(one.content, "two")
    await write_blob(one.content, "r", DATA, expected=DIGEST)
    assert await at_two.read(DIGEST, 0, 10) == DATA[:10]
    await at_one.delete(DIGEST)
    with pytest.raises(NotFound):
        await at_two.read(DIGEST, 0, 10)
    async with asyncio.timeout(PATIENCE):
        while any("(deleted)" in link for link in open_files(one.root)):
            await asyncio.sleep(0.05)
    await write_blob(one.content, "r", DATA, expected=DIGEST)
    assert await at_two.read(DIGEST, CHUNK, 10) == DATA[CHUNK : CHUNK + 10]


def open_files(root: Path) -> list[str]:
    """Of this test alone: what another one left to the garbage collector is in this process, too."""
    return [link for _, link in descriptors() if link.startswith(f"{root}/")]


async def test_a_ref_has_one_writer_among_all(start: Start) -> None:
    one, two = await start("one"), await start("two")
    at_one, at_two = at_instance(one.content, "one"), at_instance(one.content, "two")
    assert (await at_one.open("r")).instance == "one"
    with pytest.raises(Unavailable, match="'r'"):
        await at_two.open("r")
    await at_one.write("r", 0, b"half")
    with pytest.raises(NotFound, match="not open here"):
        await at_two.write("r", 4, b"x")
    assert (await at_two.status("r")).offset == 4
    await at_one.close("r")
    opened = await at_two.open("r")
    assert (opened.instance, opened.offset) == ("two", 4)
    assert (await at_two.commit("r")).digest == digest_of(b"half")
    assert await at_one.read(digest_of(b"half")) == b"half"
    assert two.requests("commit") == 1


async def test_an_open_that_is_delivered_to_both_has_one_answer(start: Start) -> None:
    from wherry_shared import context

    one, _ = await start("one"), await start("two")
    with context.use(key="same"):
        first = await at_instance(one.content, "one").open("r")
        assert await at_instance(one.content, "two").open("r") == first


async def test_an_abort_at_another_replica(start: Start, tmp_path: Path) -> None:
    one, _ = await start("one", idle=3.0), await start("two")
    at_one, at_two = at_instance(one.content, "one"), at_instance(one.content, "two")
    await at_one.open("r")
    await at_one.write("r", 0, b"half")
    await at_two.abort("r")
    with pytest.raises(NotFound):
        await at_one.write("r", 4, b"x")
    with pytest.raises(NotFound):
        await at_one.commit("r")
    assert (await at_two.open("r")).offset == 0
    async with asyncio.timeout(PATIENCE):
        while ("default", "r") in one.store._writers:
            await asyncio.sleep(0.05)
    assert (await at_two.write("r", 0, b"new")) == 3


async def test_a_status_anywhere_keeps_an_ingest_held(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(store, "time", SimpleNamespace(monotonic=lambda: now))
    one, _ = await start("one", idle=60.0), await start("two")
    at_one, at_two = at_instance(one.content, "one"), at_instance(one.content, "two")
    await at_one.open("r")
    name, writer = ("default", "r"), one.store._writers["default", "r"]
    for _ in range(8):
        await asyncio.sleep(0.02)  # times of files may be some milliseconds coarse
        await at_two.status("r")
        now += 40
        await one.store._let_go_if_idle(name, writer)
    assert await at_one.write("r", 0, b"x") == 1
    await one.store._let_go_if_idle(name, writer)
    now += 61
    await one.store._let_go_if_idle(name, writer)
    with pytest.raises(NotFound, match="not open here"):
        await at_one.write("r", 1, b"x")


async def test_the_same_blob_through_both_at_once(start: Start) -> None:
    one, _ = await start("one"), await start("two")

    async def put(instance: str, ref: str) -> bool:
        at = at_instance(one.content, instance)
        await at.open(ref)
        for offset in range(0, len(DATA), CHUNK):
            await at.write(ref, offset, DATA[offset : offset + CHUNK])
        try:
            await at.commit(ref, expected=DIGEST)
        except AlreadyExists:
            return False
        return True

    assert sorted(await asyncio.gather(put("one", "a"), put("two", "b"))) == [False, True]
    assert await one.content.statuses() == []
    assert b"".join([c async for c in read_blob(one.content, DIGEST, local=False)]) == DATA


async def test_uploads_and_deletions_of_one_blob_race(start: Start) -> None:
    """A row never stands without its file, whichever replica comes first."""
    one, _ = await start("one"), await start("two")
    small = DATA[:1000]
    digest = digest_of(small)

    async def put(n: int) -> None:
        for i in range(15):
            await write_blob(one.content, f"r{n}-{i}", small, expected=digest)

    async def delete() -> None:
        for _ in range(40):
            try:
                await one.content.delete(digest)
            except NotFound:
                await asyncio.sleep(0)

    async def read() -> None:
        for _ in range(200):
            try:
                assert await one.content.read(digest) == small
            except NotFound:
                await asyncio.sleep(0)

    await asyncio.gather(delete(), read(), return_exceptions=False)
    results = await asyncio.gather(put(1), put(2), delete(), return_exceptions=True)
    assert all(r is None or isinstance(r, NotFound) for r in results), results
    await write_blob(one.content, "last", small, expected=digest)
    assert await one.content.read(digest) == small
