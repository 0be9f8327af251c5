"""What a power cut leaves of an ingest: the bytes that its note counts, and a writer that goes on from there."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from contentd import Replica, digest_of
from housebus import PATIENCE
from wherry_content.backends import durable
from wherry_content.backends.local_ingest import SAVE_BYTES
from wherry_shared.api.content import CHUNK, Content
from wherry_shared.bus.proxy import at_instance
from wherry_shared.errors import Aborted, DataLoss, Unavailable
from wherry_shared.streams import BlobWriter

DATA = os.urandom(1 << 20) * (SAVE_BYTES >> 20) + os.urandom(5 * CHUNK)
DIGEST = digest_of(DATA)

Start = Callable[..., Awaitable[Replica]]


async def until_durable(content: Content, ref: str) -> int:
    async with asyncio.timeout(PATIENCE):
        while not (found := (await content.status(ref)).durable):
            await asyncio.sleep(0.01)
    return found


async def filled(replica: Replica) -> int:
    """An ingest that holds DATA; answers how much of it is durable."""
    opened = await replica.content.open("r", expected=DIGEST)
    writer = at_instance(replica.content, opened.instance)
    for at in range(0, len(DATA), CHUNK):
        await writer.write("r", at, DATA[at : at + CHUNK])
    found = await until_durable(replica.content, "r")
    assert SAVE_BYTES <= found <= len(DATA)
    return found


async def crash(replica: Replica) -> None:
    """Its locks go, its bytes stay and nothing more is made durable, as if it were killed."""
    for writer in replica.store._writers.values():
        writer.held._save = lambda: None  # type: ignore[attr-defined]
        await writer.held.release(keep=True)
        while writer.held._users:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
    replica.store._writers.clear()


async def test_after_another_boot_the_durable_bytes_count(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = await start()
    kept = await filled(replica)
    await crash(replica)
    monkeypatch.setattr(durable, "boot_id", lambda: "another")
    opened = await replica.content.open("r", expected=DIGEST)
    assert opened.offset == kept
    writer = at_instance(replica.content, "one")
    end = kept
    while end < len(DATA):
        end = await writer.write("r", end, DATA[end : end + CHUNK])
    assert (await writer.commit("r", len(DATA), DIGEST)).size == len(DATA)


async def test_in_the_same_boot_all_bytes_count(start: Start) -> None:
    replica = await start()
    await filled(replica)
    await crash(replica)
    assert (await replica.content.open("r", expected=DIGEST)).offset == len(DATA)


async def test_a_note_that_says_nothing_counts_for_nothing(start: Start) -> None:
    replica = await start()
    await filled(replica)
    await crash(replica)
    (note,) = replica.root.glob("ingest/*/durable")
    for text in ("", "nonsense", "-5 x", "9" * 30):
        note.write_text(text)
        assert (await replica.content.status("r")).durable in (0, len(DATA))
    note.write_text("")
    assert (await replica.content.open("r")).offset == 0


async def test_a_closed_ingest_is_durable_whole(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = await start()
    opened = await replica.content.open("r")
    await at_instance(replica.content, opened.instance).write("r", 0, b"half")
    await at_instance(replica.content, opened.instance).close("r")
    assert (await replica.content.status("r")).durable == 4
    monkeypatch.setattr(durable, "boot_id", lambda: "another")
    assert (await replica.content.open("r")).offset == 4


async def test_what_starts_over_is_not_durable(start: Start) -> None:
    replica = await start()
    await filled(replica)
    await at_instance(replica.content, "one").write("r", 0, b"new")
    assert (await replica.content.status("r")).durable == 0


@pytest.mark.parametrize("way", ["copy", "write"])
async def test_a_writer_from_afar_whose_service_lost_bytes(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    replica = await start()
    (tmp_path / "source").write_bytes(DATA)
    async with BlobWriter(replica.content, "r", expected=DIGEST, local=False) as writer:
        await writer.write(DATA[:-CHUNK])
        kept = await until_durable(replica.content, "r")
        await writer._out.flush()
        if kept >= len(DATA) - CHUNK:
            pytest.skip("everything was durable already")
        await crash(replica)
        monkeypatch.setattr(durable, "boot_id", lambda: "another")
        if way == "copy":
            with (tmp_path / "source").open("rb") as source:
                await writer.copy_from(source)
        else:
            with pytest.raises(Unavailable, match=f"has {kept} of"):
                await writer.write(DATA[-CHUNK:])
                await writer.commit()
            assert writer.offset == kept
            await writer.write(DATA[kept:])
        assert (await writer.commit()).digest == DIGEST


async def test_a_writer_whose_ingest_is_gone_begins_again(start: Start) -> None:
    replica = await start()
    with pytest.raises(Aborted, match="'r'"):
        async with BlobWriter(replica.content, "r", expected=DIGEST, local=False) as writer:
            await writer.write(DATA[: 4 * CHUNK])
            await writer._out.flush()
            await replica.content.abort("r")
            await writer.write(DATA[4 * CHUNK :])
            await writer.commit()


async def test_an_fsync_that_fails_on_the_way_fails_the_commit(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells a failed write-back once; the fsync after that one succeeds, and the bytes are not there."""
    replica = await start()

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("wherry_content.backends.local_ingest.os.fdatasync", broken)
    opened = await replica.content.open("r")
    writer = at_instance(replica.content, opened.instance)
    for at in range(0, len(DATA), CHUNK):
        await writer.write("r", at, DATA[at : at + CHUNK])
    async with asyncio.timeout(PATIENCE):
        while replica.store._writers["default", "r"].held._unsaved is None:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
    with pytest.raises(DataLoss, match="'r'"):
        await writer.commit("r", len(DATA), DIGEST)
    status = await replica.content.status("r")
    assert (status.offset, status.durable) == (len(DATA), 0)
    assert not replica.backend.has(DIGEST, len(DATA))
    monkeypatch.undo()
    await writer.close("r")
    assert (await replica.content.open("r")).offset == 0  # what is in memory may be all there is of it
