"""The content service killed at the worst moments: nothing acknowledged is lost, nothing half done is shown."""

from __future__ import annotations

import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from contentd import Replica, digest_of
from wherry_shared.bus.proxy import at_instance
from wherry_shared.errors import NotFound, Unavailable
from wherry_shared.streams import read_blob, write_blob

BYTES = bytes(range(256)) * 1024  # what doomed.py writes
DIGEST = digest_of(BYTES)

Start = Callable[..., Awaitable[Replica]]
Doomed = Callable[[str], "subprocess.Popen[str]"]


def files(root: Path) -> list[str]:
    """Every file of blobs, ingests and trash."""
    return [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and not p.name.startswith("metadata.db")]


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


async def test_killed_in_the_middle_of_an_ingest(doomed: Doomed, start: Start) -> None:
    process = doomed("write")
    acknowledged = 0
    while acknowledged < 20 * len(BYTES):
        acknowledged = int(line(process))
    process.kill()
    process.wait()
    content = (await start()).content
    offset = (await content.status("layer")).offset
    assert offset >= acknowledged
    opened = await content.open("layer")
    assert opened.offset == offset
    rest = BYTES[offset % len(BYTES) :] + BYTES
    writer = at_instance(content, opened.instance)
    await writer.write("layer", offset, rest)
    whole = BYTES * ((offset + len(rest)) // len(BYTES))
    assert (await writer.commit("layer", len(whole), digest_of(whole))).size == len(whole)
    assert b"".join([c async for c in read_blob(content, digest_of(whole), local=False)]) == whole


@pytest.mark.parametrize("moment", ["seal", "rename"])
async def test_killed_before_the_row_is_there(doomed: Doomed, start: Start, tmp_path: Path, moment: str) -> None:
    assert doomed(moment).wait(60) == -9
    there = any(name.startswith("blobs/") for name in files(tmp_path / "content"))
    assert there is (moment == "rename")
    content = (await start()).content
    with pytest.raises(NotFound):
        await content.info(DIGEST)
    assert not any(name.startswith(("blobs/", "trash/")) for name in files(tmp_path / "content"))
    assert (await content.status("layer")).offset == (len(BYTES) if moment == "seal" else 0)
    assert (await write_blob(content, "layer", BYTES, expected=DIGEST)).size == len(BYTES)
    assert await content.read(DIGEST) == BYTES


async def test_killed_after_the_row_is_there(doomed: Doomed, start: Start, tmp_path: Path) -> None:
    assert doomed("row").wait(60) == -9
    content = (await start()).content
    assert await content.read(DIGEST) == BYTES
    assert await content.statuses() == []
    assert files(tmp_path / "content") == [f"blobs/{DIGEST.replace(':', '/')}"]
    assert (await content.open("layer")).offset == 0


@pytest.mark.parametrize("moment", ["put-seal", "put-row"])
async def test_killed_while_a_blob_is_put_whole(doomed: Doomed, start: Start, tmp_path: Path, moment: str) -> None:
    assert doomed(moment).wait(60) == -9
    blob = f"blobs/{DIGEST.replace(':', '/')}"
    assert blob in files(tmp_path / "content")  # named before its row is there
    content = (await start()).content
    if moment == "put-seal":
        with pytest.raises(NotFound):
            await content.info(DIGEST)
        assert files(tmp_path / "content") == []
        await content.put(BYTES, DIGEST)
    assert await content.read(DIGEST) == BYTES
    assert files(tmp_path / "content") == [blob]


async def test_killed_between_the_row_and_the_file_of_a_deletion(doomed: Doomed, start: Start, tmp_path: Path) -> None:
    assert doomed("delete").wait(60) == -9
    assert files(tmp_path / "content")
    content = (await start()).content
    with pytest.raises(NotFound):
        await content.info(DIGEST)
    assert files(tmp_path / "content") == []


async def test_a_lock_dies_with_its_process(doomed: Doomed, start: Start) -> None:
    process = doomed("hold")
    assert line(process) == "held\n"
    content = (await start()).content  # a start sweeps nothing that is held
    with pytest.raises(Unavailable, match="'layer'"):
        await content.open("layer")
    process.kill()
    process.wait()
    assert (await content.open("layer")).offset == 0
