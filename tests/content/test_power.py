"""The power is cut at the moment of an acknowledgement: what was acknowledged is there, the rest is not pretended.

The disk is an image under a loop device. What its filesystem has not handed to the device by then is lost with the
machine's memory: a copy of the image taken at that moment, mounted elsewhere, is what the next boot finds.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from contentd import Replica, digest_of
from housebus import PATIENCE
from wherry_content.backends import durable
from wherry_content.backends.local_ingest import SAVE_BYTES
from wherry_shared.api.content import CHUNK
from wherry_shared.bus.proxy import at_instance
from wherry_shared.errors import NotFound
from wherry_shared.streams import read_blob, write_blob

DATA = os.urandom(3 * CHUNK + 17)
DIGEST = digest_of(DATA)
LARGE = os.urandom(1 << 20) * (SAVE_BYTES >> 20) + os.urandom(3 << 20)
LARGE_DIGEST = digest_of(LARGE)

Start = Callable[..., Awaitable[Replica]]


class Disk:
    """An ext4 in a file; `cut(name)` answers another mount with what a power cut now would leave."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._image = base / "disk.img"
        with self._image.open("wb") as file:
            file.truncate(256 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,nodiscard", str(self._image)], check=True)
        self.mounts: list[Path] = []
        self.path = self._mount(self._image, "disk")

    def _mount(self, image: Path, name: str) -> Path:
        path = self._base / name
        path.mkdir()
        # A commit of the journal every 1000 s: nothing gets to the device by itself while a test looks.
        subprocess.run(["mount", "-o", "loop,commit=1000", str(image), str(path)], check=True)
        self.mounts.append(path)
        return path

    def cut(self, name: str) -> Path:
        image = self._base / f"{name}.img"
        subprocess.run(["cp", "--sparse=always", str(self._image), str(image)], check=True)
        return self._mount(image, name)

    def close(self) -> None:
        for path in self.mounts:
            subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("way", ["file", "bus", "put"])
async def test_a_commit_that_was_answered_is_there(start: Start, disk: Disk, way: str) -> None:
    content = (await start(root=disk.path / "content")).content
    data = DATA[:CHUNK] if way == "put" else DATA
    digest = digest_of(data)
    if way == "put":
        await content.put(data, digest, {"a": "b"})
    else:
        await write_blob(content, "r", data, expected=digest, labels={"a": "b"}, local=way == "file")
    left = disk.cut("left")
    database = sqlite3.connect(left / "content" / "metadata.db")
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()
    after = (await start("two", root=left / "content")).content
    found = at_instance(after, "two")
    assert (await found.info(digest)).labels == {"a": "b"}
    assert await found.statuses() == []
    await found.verify(digest)
    assert b"".join([c async for c in read_blob(found, digest, verify=True)]) == data


async def test_a_deletion_that_was_answered_stays_one(start: Start, disk: Disk) -> None:
    content = (await start(root=disk.path / "content")).content
    await write_blob(content, "r", DATA, expected=DIGEST)
    await content.delete(DIGEST)
    left = disk.cut("left")
    found = at_instance((await start("two", root=left / "content")).content, "two")
    with pytest.raises(NotFound):
        await found.info(DIGEST)
    assert list((left / "content" / "blobs" / "sha256").iterdir()) == []
    assert (await write_blob(found, "again", DATA, expected=DIGEST)).size == len(DATA)


async def test_an_ingest_goes_on_from_what_is_durable(
    start: Start, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = await start(root=disk.path / "content")
    opened = await replica.content.open("r", expected=LARGE_DIGEST)
    end = opened.offset
    while end < len(LARGE):
        end = await at_instance(replica.content, "one").write("r", end, LARGE[end : end + CHUNK])
    async with asyncio.timeout(PATIENCE):
        while not (kept := (await replica.content.status("r")).durable):
            await asyncio.sleep(0.01)
    left = disk.cut("left")
    monkeypatch.setattr(durable, "boot_id", lambda: "the next one")
    found = at_instance((await start("two", root=left / "content")).content, "two")
    again = await found.open("r", expected=LARGE_DIGEST)
    assert kept <= again.offset <= len(LARGE)
    (data,) = (left / "content" / "ingest").glob("*/data")
    assert data.read_bytes() == LARGE[: again.offset]
    end = again.offset
    while end < len(LARGE):
        end = await found.write("r", end, LARGE[end : end + CHUNK])
    assert (await found.commit("r", len(LARGE), LARGE_DIGEST)).size == len(LARGE)


async def test_the_cut_is_one(start: Start, disk: Disk) -> None:
    """The means of these tests: what nobody made durable is not in the copy."""
    (disk.path / "fleeting").write_bytes(DATA)
    left = disk.cut("left")
    assert not (left / "fleeting").exists() or (left / "fleeting").read_bytes() != DATA
    os.sync()
    assert (disk.cut("kept") / "fleeting").read_bytes() == DATA
