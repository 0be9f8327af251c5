"""Blobs in and out: through the file on the same host, and in chunks from afar."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from contentd import Replica, digest_of
from descriptors import descriptors
from housebus import PATIENCE
from wherry_content.service import ContentService
from wherry_shared import context
from wherry_shared.api.content import CHUNK, Content, Info, Located, Opened
from wherry_shared.bus import Bus
from wherry_shared.bus.proxy import at_instance
from wherry_shared.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)  # fmt: skip
from wherry_shared.memory import MemoryTransport
from wherry_shared.streams import BlobWriter, local_blob, read_blob, write_blob

DATA = os.urandom(9 * CHUNK + 1234)
DIGEST = digest_of(DATA)
both_ways = pytest.mark.parametrize("local", [True, False], ids=["file", "bus"])


class Flaky(ContentService):
    """Fails once per entry of `trouble`: `<operation>` before it has done anything, `<operation>!` after it has."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.trouble: dict[str, Exception] = {}

    async def write(self, ref: str, offset: int, data: bytes) -> int:
        self._fail(f"write at {offset}")
        end = await super().write(ref, offset, data)
        self._fail(f"write at {offset}!")
        return end

    async def commit(self, ref: str, size: int = 0, expected: str = "", labels: dict[str, str] | None = None) -> Info:
        self._fail("commit")
        info = await super().commit(ref, size, expected, labels)
        self._fail("commit!")
        return info

    def _fail(self, when: str) -> None:
        error = self.trouble.pop(when, None)
        if error is not None:
            raise error


class Liar(ContentService):
    """Answers a path of the caller's host that is not a file of content."""

    victim = Path()

    async def open(self, ref: str, total: int = 0, expected: str = "", truncate: bool = False) -> Opened:
        opened = await super().open(ref, total, expected, truncate)
        return opened.model_copy(update=self._lie())

    async def locate(self, digest: str) -> Located:
        return (await super().locate(digest)).model_copy(update=self._lie())

    def _lie(self) -> dict[str, Any]:
        state = self.victim.stat()
        return {"path": str(self.victim), "device": state.st_dev, "inode": state.st_ino}


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    made = Bus(MemoryTransport(), node="n1")
    yield made
    await made.close()


@pytest.fixture
async def replica(bus: Bus, tmp_path: Path) -> AsyncIterator[Replica]:
    made = Replica(bus, tmp_path, service=Flaky)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def content(replica: Replica) -> Content:
    return replica.content


async def read_all(content: Content, digest: str = DIGEST, **options: Any) -> bytes:
    return b"".join([chunk async for chunk in read_blob(content, digest, **options)])


async def pieces(data: bytes = DATA, size: int = 100_000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def open_blobs() -> list[str]:
    return [link for _, link in descriptors() if DIGEST.partition(":")[2] in link]


# ---- the usual


@both_ways
async def test_memory_may_be_used_again(content: Content, local: bool) -> None:
    """A view that was written is the caller's again when the next one was taken."""
    blocks = [bytearray(CHUNK), bytearray(CHUNK)]
    async with BlobWriter(content, "r", expected=DIGEST, local=local) as writer:
        for at in range(0, len(DATA), CHUNK):
            piece = DATA[at : at + CHUNK]
            blocks.reverse()
            blocks[0][: len(piece)] = piece
            await writer.write(memoryview(blocks[0])[: len(piece)])
        assert (await writer.commit()).size == len(DATA)


@both_ways
async def test_in_and_out(replica: Replica, content: Content, local: bool) -> None:
    info = await write_blob(content, "r", pieces(), size=len(DATA), expected=DIGEST, labels={"a": "b"}, local=local)
    assert (info.digest, info.size, info.labels) == (DIGEST, len(DATA), {"a": "b"})
    assert await read_all(content, local=local, verify=True) == DATA
    assert await read_all(content, local=local, offset=CHUNK + 7) == DATA[CHUNK + 7 :]
    assert await read_all(content, local=local, offset=len(DATA)) == b""
    assert (replica.requests("write"), replica.requests("read")) == ((0, 0) if local else (10, 19))
    with pytest.raises(OutOfRange):
        await read_all(content, local=local, offset=len(DATA) + 1)
    with pytest.raises(NotFound):
        await read_all(content, digest_of(b"not there"), local=local)


@both_ways
async def test_large_and_small_writes(content: Content, local: bool) -> None:
    sizes = [0, 1, CHUNK - 1, CHUNK + 1, 3 * CHUNK, 17]
    data = DATA[: sum(sizes)]
    async with BlobWriter(content, "r", local=local) as writer:
        assert writer.is_local is local
        at = 0
        for size in sizes:
            await writer.write(data[at : at + size])
            at += size
            assert writer.offset == at
        assert (await writer.commit()).digest == digest_of(data)


@both_ways
async def test_many_tiny_writes(content: Content, local: bool) -> None:
    data = DATA[:3000]
    async with BlobWriter(content, "r", local=local) as writer:
        for i in range(len(data)):
            await writer.write(data[i : i + 1])
        assert (await writer.commit()).digest == digest_of(data)


@both_ways
async def test_an_empty_blob(content: Content, local: bool) -> None:
    info = await write_blob(content, "r", b"", expected=digest_of(b""), local=local)
    assert await read_all(content, info.digest, local=local, verify=True) == b""


@both_ways
async def test_what_was_left_is_resumed(replica: Replica, content: Content, local: bool) -> None:
    async with BlobWriter(content, "r", expected=DIGEST, local=local) as writer:
        await writer.write(DATA[:1_000_000])
    await replica.restart()
    async with BlobWriter(content, "r", expected=DIGEST, local=local) as writer:
        assert writer.offset == 1_000_000
        await writer.write(DATA[1_000_000:])
        assert (await writer.commit(labels={"a": "b"})).labels == {"a": "b"}
    assert await read_all(content) == DATA
    with pytest.raises(AlreadyExists):
        async with BlobWriter(content, "s", expected=DIGEST):
            pytest.fail("it is there")
    assert (await write_blob(content, "t", DATA, expected=DIGEST)).labels == {"a": "b"}


@both_ways
async def test_a_stream_skips_what_is_there_already(content: Content, local: bool) -> None:
    async with BlobWriter(content, "r", local=local) as writer:
        await writer.write(DATA[:250_001])
    assert (await write_blob(content, "r", pieces(), expected=DIGEST, local=local)).size == len(DATA)


@both_ways
async def test_other_bytes_left_under_the_ref_do_not_stay(content: Content, local: bool) -> None:
    async with BlobWriter(content, "r", local=local) as writer:
        await writer.write(b"something else")
    assert (await write_blob(content, "r", DATA, expected=DIGEST, local=local)).size == len(DATA)
    async with BlobWriter(content, "s", local=local) as writer:
        await writer.write(b"something else")
        await writer.restart()
        assert writer.offset == 0
        await writer.write(b"right")
        assert (await writer.commit()).digest == digest_of(b"right")


@both_ways
async def test_wrong_bytes_are_refused_and_stay(content: Content, local: bool) -> None:
    async with BlobWriter(content, "r", total=4, expected=DIGEST, local=local) as writer:
        await writer.write(b"nope")
        with pytest.raises(FailedPrecondition, match=DIGEST):
            await writer.commit()
    assert (await content.status("r")).offset == 4


@both_ways
async def test_abort(content: Content, local: bool) -> None:
    async with BlobWriter(content, "r", local=local) as writer:
        await writer.write(b"nope")
        await writer.abort()
    assert await content.statuses() == []
    with pytest.raises(FailedPrecondition, match="not open"):
        await writer.write(b"x")


@both_ways
async def test_a_reader_that_stops_leaves_nothing_behind(content: Content, local: bool) -> None:
    await write_blob(content, "r", DATA, expected=DIGEST)
    async with aclosing(read_blob(content, DIGEST, local=local)) as chunks:
        async for _ in chunks:
            break
    reading = [task for task in asyncio.all_tasks() if "object _read at" in repr(task.get_coro())]
    assert not reading
    async with asyncio.timeout(PATIENCE):
        while local and open_blobs():  # the thread that read last has yet to let go of it
            await asyncio.sleep(0.01)


async def test_the_file_itself(content: Content) -> None:
    await write_blob(content, "r", DATA, expected=DIGEST)
    file = await local_blob(content, DIGEST)
    assert file is not None
    with file:
        await content.delete(DIGEST)
        assert file.read() == DATA


async def test_a_request_that_has_a_key_may_write_many_chunks(content: Content) -> None:
    with context.use(key="one-request"):
        for ref in ("a", "b"):
            data = ref.encode() * (2 * CHUNK)
            assert (await write_blob(content, ref, data, expected=digest_of(data), local=False)).size == 2 * CHUNK


# ---- what is not to be trusted


async def test_rotten_bytes_are_found_where_it_is_promised(content: Content) -> None:
    await write_blob(content, "r", DATA, expected=DIGEST)
    path = (await content.locate(DIGEST)).path
    with open(path, "r+b") as file:
        file.seek(CHUNK)
        file.write(bytes([DATA[CHUNK] ^ 1]))
    for local in (True, False):
        assert len(await read_all(content, local=local)) == len(DATA)
        with pytest.raises(DataLoss, match=DIGEST):
            await read_all(content, local=local, verify=True)
    os.truncate(path, 2 * CHUNK)
    for local in (True, False):
        with pytest.raises(DataLoss, match=DIGEST):
            await read_all(content, local=local)


async def test_a_path_that_is_no_file_of_content_is_not_touched(bus: Bus, tmp_path: Path) -> None:
    Liar.victim = tmp_path / "passwd"
    Liar.victim.write_bytes(b"root")
    replica = Replica(bus, tmp_path / "root", service=Liar)
    await replica.start()
    try:
        async with BlobWriter(replica.content, "r") as writer:
            assert not writer.is_local
            await writer.write(DATA)
            await writer.commit()
        assert await read_all(replica.content) == DATA
        assert Liar.victim.read_bytes() == b"root"
        elsewhere = tmp_path / "elsewhere" / "blobs" / "sha256" / DIGEST.partition(":")[2]
        elsewhere.parent.mkdir(parents=True)
        elsewhere.symlink_to(Liar.victim)
        Liar.victim = elsewhere
        assert await read_all(replica.content) == DATA
    finally:
        await replica.stop()


# ---- troubles


async def test_a_writer_waits_for_the_ref(content: Content) -> None:
    async with BlobWriter(content, "r") as first:
        await first.write(b"one ")
        with pytest.raises(Unavailable, match="'r'"):
            await BlobWriter(content, "r", patience=0.1).__aenter__()
        # While a request is under way at that very moment, nobody knows what became of it.
        with context.use(timeout=0.1), pytest.raises((Unavailable, DeadlineExceeded)):
            await BlobWriter(content, "r").__aenter__()
        waiting = asyncio.create_task(BlobWriter(content, "r").__aenter__())
        await asyncio.sleep(0.1)
        assert not waiting.done()
    second = await waiting
    assert second.offset == 4
    await second.write(b"two")
    assert (await second.commit()).digest == digest_of(b"one two")


@both_ways
async def test_a_commit_of_what_exists_lets_go_of_nobody_elses_ingest(content: Content, local: bool) -> None:
    await write_blob(content, "other", DATA, expected=DIGEST)
    async with BlobWriter(content, "r", local=local) as first:
        await first.write(DATA)
        with pytest.raises(AlreadyExists):
            await first.commit()
        second = await BlobWriter(content, "r", local=local).__aenter__()
    with pytest.raises(Unavailable, match="'r'"):
        await BlobWriter(content, "r", patience=0.1).__aenter__()
    await second.write(b"two")
    assert (await second.commit()).digest == digest_of(b"two")


@pytest.mark.parametrize("when", [f"write at {2 * CHUNK}", f"write at {2 * CHUNK}!", "write at 0", "write at 0!"])
@pytest.mark.parametrize("error", [Unavailable("gone"), OutOfRange("lost"), NotFound("not open here")])
async def test_a_chunk_that_gets_lost_is_sent_again(
    replica: Replica, content: Content, when: str, error: Exception
) -> None:
    service = replica.service
    assert isinstance(service, Flaky)
    service.trouble = {when: error}
    async with BlobWriter(content, "r", expected=DIGEST, local=False) as writer:
        await writer.write(DATA)
        assert (await writer.commit()).size == len(DATA)
    assert not service.trouble
    assert await read_all(content) == DATA


async def test_no_space_is_told_and_the_ingest_stays(replica: Replica, content: Content) -> None:
    service = replica.service
    assert isinstance(service, Flaky)
    service.trouble = {f"write at {4 * CHUNK}": ResourceExhausted("ingest 'r': no space left on device")}
    with pytest.raises(ResourceExhausted, match="'r'"):
        async with BlobWriter(content, "r", local=False) as writer:
            await writer.write(DATA)
            await writer.commit()
    async with BlobWriter(content, "r", local=False) as writer:
        assert 0 < writer.offset <= len(DATA)


@both_ways
@pytest.mark.parametrize("when", ["commit", "commit!"])
async def test_the_answer_of_a_commit_gets_lost(replica: Replica, content: Content, local: bool, when: str) -> None:
    service = replica.service
    assert isinstance(service, Flaky)
    service.trouble = {when: Unavailable("gone")}
    async with BlobWriter(content, "r", expected=DIGEST, local=local) as writer:
        await writer.write(DATA)
        info = await writer.commit(labels={"a": "b"})
    assert (info.size, info.labels, service.trouble) == (len(DATA), {"a": "b"}, {})
    assert await content.statuses() == []


@both_ways
async def test_the_instance_dies_and_another_takes_over(bus: Bus, tmp_path: Path, local: bool) -> None:
    one, two = Replica(bus, tmp_path, "one"), Replica(bus, tmp_path, "two")
    await one.start()
    try:
        async with BlobWriter(one.content, "r", expected=DIGEST, local=local) as writer:
            await writer.write(DATA[: 5 * CHUNK])
            await two.start()
            await one.stop()
            await writer.write(DATA[5 * CHUNK :])
            assert (await writer.commit()).size == len(DATA)
        assert await read_all(two.content, local=local, verify=True) == DATA
    finally:
        await one.stop()
        await two.stop()


@both_ways
async def test_an_ingest_that_is_taken_away_is_not_begun_again_in_the_middle(content: Content, local: bool) -> None:
    with pytest.raises(Aborted, match="'r'"):
        async with BlobWriter(content, "r", expected=DIGEST, local=local) as writer:
            await writer.write(DATA[: 4 * CHUNK])
            if not local:
                await writer._out.flush()
            await content.abort("r")
            await writer.write(DATA[4 * CHUNK :])
            await writer.commit()
    with pytest.raises(NotFound):
        await content.info(DIGEST)


async def test_a_cancelled_writer_keeps_what_it_had(content: Content) -> None:
    started = asyncio.Event()

    async def work() -> None:
        async with BlobWriter(content, "r") as writer:
            await writer.write(DATA[: 3 * CHUNK])
            started.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with BlobWriter(content, "r") as writer:
        assert writer.offset == 3 * CHUNK


async def test_at_instance_of_the_service_itself(replica: Replica) -> None:
    assert at_instance(replica.service, "one") is replica.service
    with context.use(namespace="default"):
        assert (await write_blob(replica.service, "r", DATA, expected=DIGEST)).size == len(DATA)
        assert await read_all(replica.service, verify=True) == DATA
