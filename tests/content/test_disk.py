"""Disks that are full, files that rot or vanish: told in the right words, and healed where that is promised."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from contentd import Replica, digest_of
from wherry_shared.api.content import CHUNK, Content
from wherry_shared.bus.proxy import at_instance
from wherry_shared.errors import AlreadyExists, DataLoss, NotFound, ResourceExhausted
from wherry_shared.streams import BlobWriter, write_blob

DATA = os.urandom(CHUNK)
DIGEST = digest_of(DATA)

Start = Callable[..., Awaitable[Replica]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 5 MiB and 60 inodes."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m,nr_inodes=60", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


async def fill(content: Content, ref: str) -> None:
    opened = await content.open(ref)
    writer, offset = at_instance(content, opened.instance), opened.offset
    while True:
        offset = await writer.write(ref, offset, os.urandom(CHUNK))


@pytest.mark.parametrize("way", ["write", "bus", "file"])
async def test_a_full_disk(start: Start, small_disk: Path, way: str) -> None:
    content = (await start(root=small_disk / "content")).content
    await write_blob(content, "first", DATA, expected=DIGEST)
    with pytest.raises(ResourceExhausted, match="'big'"):
        if way == "write":
            await fill(content, "big")
        async with BlobWriter(content, "big", local=way == "file") as writer:
            for _ in range(20):
                await writer.write(os.urandom(CHUNK))
            await writer.commit()
    kept = (await content.status("big")).offset
    assert kept >= CHUNK
    assert await content.read(DIGEST) == DATA[:CHUNK]
    await content.abort("big")
    small = os.urandom(3 * CHUNK)
    assert (await write_blob(content, "small", small, expected=digest_of(small))).size == len(small)


async def test_a_full_disk_lets_go_of_blobs(start: Start, small_disk: Path) -> None:
    content = (await start(root=small_disk / "content")).content
    await write_blob(content, "first", DATA, expected=DIGEST)
    opened = await content.open("big")
    with pytest.raises(ResourceExhausted):
        await fill_rest(content, "big", opened.instance)
    (small_disk / "rest").write_bytes(b"")
    with pytest.raises(OSError), open(small_disk / "rest", "wb", buffering=0) as rest:  # the last page, too
        while True:
            rest.write(b"x" * 4096)
    with pytest.raises(ResourceExhausted):
        await at_instance(content, opened.instance).write("big", (await content.status("big")).offset, b"x" * 8192)
    await content.delete(DIGEST)
    await content.abort("big")
    with pytest.raises(NotFound):
        await content.info(DIGEST)
    assert (await write_blob(content, "first", DATA, expected=DIGEST)).size == len(DATA)


async def fill_rest(content: Content, ref: str, instance: str) -> None:
    writer = at_instance(content, instance)
    while True:
        await writer.write(ref, (await content.status(ref)).offset, os.urandom(CHUNK))


async def test_no_space_for_the_row(start: Start, small_disk: Path) -> None:
    """The bytes are there and verified, and their row is not: the ingest stays as it was."""
    replica = await start(root=small_disk / "content")
    content = replica.content
    opened = await content.open("r")
    writer = at_instance(content, opened.instance)
    await writer.write("r", 0, DATA)
    labels = {f"label-{i}": "x" * 4000 for i in range(100)}
    with pytest.raises(OSError), open(small_disk / "rest", "wb", buffering=0) as rest:
        while True:
            rest.write(b"x" * 4096)
    with pytest.raises(ResourceExhausted, match="'r'"):
        await writer.commit("r", labels=labels)
    assert not replica.backend.has(DIGEST, len(DATA))
    assert (await content.status("r")).offset == len(DATA)
    os.unlink(small_disk / "rest")
    assert (await writer.commit("r", len(DATA), DIGEST, labels)).labels == labels
    assert await content.read(DIGEST) == DATA[:CHUNK]


async def test_no_inodes(start: Start, small_disk: Path) -> None:
    content = (await start(root=small_disk / "content")).content
    with pytest.raises(ResourceExhausted, match=r"'r\d+'"):
        for i in range(100):
            await content.open(f"r{i}")
    refs = [ingest.ref for ingest in await content.statuses()]
    assert len(refs) > 5
    for ref in refs:
        await content.abort(ref)
    assert (await write_blob(content, "first", DATA, expected=DIGEST)).size == len(DATA)


# ---- rot


async def test_a_flipped_bit_is_found_put_aside_and_healed(start: Start) -> None:
    replica = await start()
    content = replica.content
    await write_blob(content, "r", DATA, expected=DIGEST, labels={"a": "b"})
    path = Path((await content.locate(DIGEST)).path)
    flip(path)
    assert await content.read(DIGEST) != DATA[:CHUNK]  # a plain read promises nothing else
    with pytest.raises(DataLoss, match=DIGEST):
        await content.verify(DIGEST)
    with pytest.raises(DataLoss, match="upload it again"):
        await content.read(DIGEST)
    assert (await content.locate(DIGEST)).path == ""
    assert len(list((replica.root / "rotten").iterdir())) == 1
    with pytest.raises(AlreadyExists):
        async with BlobWriter(content, "heal", expected=DIGEST) as writer:
            await writer.write(DATA)
            await writer.commit()
    await content.verify(DIGEST)
    assert await content.read(DIGEST) == DATA[:CHUNK]
    assert (await content.info(DIGEST)).labels == {"a": "b"}


@pytest.mark.parametrize("harm", ["short", "gone"])
async def test_a_short_or_missing_file_is_told_and_healed_for_every_namespace(start: Start, harm: str) -> None:
    replica = await start()
    content, other = replica.content, replica.bus.proxy(Content, namespace="other")
    await write_blob(content, "r", DATA, expected=DIGEST)
    await write_blob(other, "r", DATA, expected=DIGEST)
    path = Path((await content.locate(DIGEST)).path)
    path.unlink() if harm == "gone" else os.truncate(path, 100)
    await replica.restart()
    for each in (content, other):
        with pytest.raises(DataLoss, match=DIGEST):
            await each.read(DIGEST, 0, CHUNK)
    await write_blob(content, "heal", DATA, expected=DIGEST)
    for each in (content, other):
        assert await each.read(DIGEST) == DATA[:CHUNK]


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 4]))


# ---- what lies about


async def test_what_no_row_knows_is_swept_at_the_start(start: Start) -> None:
    replica = await start()
    await write_blob(replica.content, "r", DATA, expected=DIGEST)
    async with BlobWriter(replica.content, "half") as writer:
        await writer.write(b"half")
    stray = replica.root / "blobs" / "sha256" / ("0" * 64)
    stray.write_bytes(b"stray")
    ingest = replica.root / "ingest" / ("0" * 64)
    ingest.mkdir()
    (ingest / "data").write_bytes(b"stray")
    (replica.root / "blobs" / "sha256" / "README").write_bytes(b"a stranger's")
    await replica.restart()
    assert not stray.exists() and not ingest.exists()
    assert (replica.root / "blobs" / "sha256" / "README").exists()
    assert [(i.ref, i.offset) for i in await replica.content.statuses()] == [("half", 4)]
    assert await replica.content.read(DIGEST) == DATA[:CHUNK]


async def test_modes(start: Start) -> None:
    replica = await start()
    await write_blob(replica.content, "r", DATA, expected=DIGEST)
    async with BlobWriter(replica.content, "half") as writer:
        await writer.write(b"half")
    for path in replica.root.rglob("*"):
        mode = path.stat().st_mode & 0o777
        if path.is_dir():
            assert mode == 0o700, path
        elif path.parent.name == "sha256":
            assert mode == 0o444, path
        else:
            assert mode & 0o077 == 0 or path.name.startswith("metadata.db"), path
