"""The storage half under a kill, a power cut, a disk without inodes, and rot: an image is whole, or known not to be."""

from __future__ import annotations

import asyncio
import io
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import images
import pytest
from client.image_house import Layout, digest_of, tar_of
from client.registry_store import Store
from client.registry_traps import Trap, serving
from node import eventually
from wherry.client import Client, walk
from wherry.image import Image
from wherry.progress import Progress
from wherry.unpack import chain_ids
from wherry_shared import context
from wherry_shared.api.gc import Collections
from wherry_shared.errors import DataLoss, NotFound, ResourceExhausted, WherryError
from wherry_shared.values import now

from .half import Half

OVERLAY = "overlay"
FILES = 6000
HOST = images.architecture()
EXPIRE = "containerd.io/gc.expire"


@pytest.fixture
def half(tmp_path: Path) -> Iterator[Half]:
    with Half(tmp_path) as made:
        yield made


@pytest.fixture
async def client(half: Half) -> AsyncIterator[Client]:
    async with half.client() as made:
        yield made


def many() -> tuple[Layout, str]:
    """An image of one layer with thousands of files, and its top snapshot's name."""
    layer = tar_of((f"d{n % 50}/file-{n}", b"%d" % n) for n in range(FILES))
    layout = Layout()
    layout.name(layout.image([layer], HOST), full="docker.io/library/many:1")
    return layout, chain_ids([digest_of(layer)])[0]


async def bring(client: Client, layout: Layout) -> Image:
    (image,) = await client.import_images(io.BytesIO(layout.tar()))
    return image


async def whole(client: Client, half: Half, chain: str) -> None:
    """The snapshot holds every file of `many`, and nothing else of it is left (directories go after their records)."""
    assert (await client.snapshots.stat(OVERLAY, chain)).kind == "committed"
    names = [info.name for info in (await client.snapshots.walk(OVERLAY)).items]
    assert names == [chain]
    trees = half.root / "snapshot/overlay/snapshots"
    await asyncio.to_thread(eventually, lambda: len(list(trees.iterdir())) == 1, "what was extracted before stays")
    (tree,) = trees.glob("*/fs")
    assert sum(len(files) for _, _, files in os.walk(tree)) == FILES
    assert (tree / "d7/file-57").read_bytes() == b"57"


async def test_diff_killed_while_it_extracts(half: Half, client: Client) -> None:
    """No layer is committed by halves; the next unpack succeeds."""
    layout, chain = many()
    image = await bring(client, layout)
    for _ in range(5):
        unpacking = asyncio.create_task(image.unpack(OVERLAY))
        await asyncio.to_thread(eventually, lambda: half.extracted() > 10, "nothing is extracted")
        half.kill("diff")
        done = [info.name for info in (await client.snapshots.walk(OVERLAY)).items if info.kind == "committed"]
        half.start("diff")
        if not done:
            break
        await unpacking  # the kill came too late
        await client.snapshots.remove(OVERLAY, chain)
        await asyncio.to_thread(eventually, lambda: half.extracted() == 0, "the files stay")
    assert done == []
    with suppress(WherryError, ExceptionGroup):
        await unpacking
    await image.unpack(OVERLAY)
    await whole(client, half, chain)


async def test_what_a_dead_client_extracted_goes_with_its_lease(half: Half, client: Client) -> None:
    """The client and diff die together: nobody is left to clean up but the collector, when the lease is over."""
    layout, chain = many()
    image = await bring(client, layout)
    layer = (await image.resolve()).manifest.layers[0]
    lease = await client.leases.create("gone", {EXPIRE: (now() + timedelta(hours=1)).isoformat(timespec="seconds")})
    with context.use(lease=lease.id):
        mounts = await client.snapshots.prepare(OVERLAY, f"extract-x {chain}")
    applying = asyncio.create_task(client.diff.apply(layer, mounts))
    await asyncio.to_thread(eventually, lambda: half.extracted() > 10, "nothing is extracted")
    half.kill("diff")
    applying.cancel()
    collections = client.bus.proxy(Collections)
    await collections.collect()
    assert (await client.snapshots.stat(OVERLAY, f"extract-x {chain}")).kind == "active"
    await client.leases.delete(lease.id, sync=True)
    with pytest.raises(NotFound):
        await client.snapshots.stat(OVERLAY, f"extract-x {chain}")
    await asyncio.to_thread(eventually, lambda: half.extracted() == 0, "the files stay")
    half.start("diff")
    await image.unpack(OVERLAY)
    await whole(client, half, chain)


async def test_image_killed_during_a_pull(half: Half, client: Client) -> None:
    """What was fetched is not fetched again: not by the pull that goes on, and not by the next."""
    store, layout = Store(), Layout()
    store.put(layout, layout.image([os.urandom(2_000_000), os.urandom(2_000_000)], HOST))
    async with serving(store.handle) as trap:
        killed = asyncio.Event()

        def hurt(progress: Progress) -> None:
            if progress.kind == "layer" and progress.step == "downloading" and not killed.is_set():
                half.kill("image")
                killed.set()

        pulling = asyncio.create_task(client.pull(_reference(trap), on_progress=hurt))
        await asyncio.wait([pulling, asyncio.ensure_future(killed.wait())], return_when=asyncio.FIRST_COMPLETED)
        assert killed.is_set(), pulling
        half.start("image")
        with suppress(WherryError, ExceptionGroup):
            await pulling
        image = await client.pull(_reference(trap))
        blobs = [what for what in store.log if what == "GET blobs"]
        assert len(blobs) == 3, "a config and two layers, each once"
        assert (await image.state()).complete


def _reference(trap: Trap) -> str:
    return f"{trap.address}/team/app:v1"


async def test_a_rotten_layer_is_not_unpacked_and_the_next_pull_heals_it(half: Half, client: Client) -> None:
    layout, chain = many()
    store = Store()
    (entry,) = layout.entries
    store.put(layout, {key: entry[key] for key in ("mediaType", "digest", "size")})
    async with serving(store.handle) as trap:
        image = await client.pull(_reference(trap))
        layer = (await image.resolve()).manifest.layers[0].digest
        flip(half.blob(layer))
        with pytest.raises(DataLoss, match=layer):
            await image.unpack(OVERLAY)
        assert (await client.snapshots.walk(OVERLAY)).items == []
        with pytest.raises(DataLoss, match=layer):
            await client.content.verify(layer)
        await client.pull(_reference(trap))
        await client.content.verify(layer)
        await image.unpack(OVERLAY)
    await whole(client, half, chain)


def flip(path: Path) -> None:
    """One bit of a file's body, in the middle of the archive."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 // 512 * 512 + 512)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


# ---- disks of their own


def _make_disk(base: Path, size: str, *options: str) -> Path:
    image = base / "disk.img"
    subprocess.run(["truncate", "-s", size, image], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,nodiscard", *options, image], check=True)
    return image


class Mounts:
    """Images under loop devices, unmounted at the end."""

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def mount(self, image: Path, path: Path, options: str = "loop") -> Path:
        path.mkdir()
        subprocess.run(["mount", "-o", options, image, path], check=True)
        self.paths.append(path)
        return path


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    made = Mounts()
    yield made
    for path in made.paths:
        eventually(lambda p=path: subprocess.run(["umount", p]).returncode == 0, f"{path} stays busy")


async def test_the_power_is_cut_when_a_pull_was_answered(tmp_path: Path, mounts: Mounts) -> None:
    """The disk as the device has it at that moment: every database opens whole, and the image is whole."""
    image_file = _make_disk(tmp_path, "256M")
    disk = mounts.mount(image_file, tmp_path / "disk", "loop,commit=1000")  # the journal writes nothing by itself
    layout, chain = many()
    store = Store()
    (entry,) = layout.entries
    store.put(layout, {key: entry[key] for key in ("mediaType", "digest", "size")})
    left_file = tmp_path / "left.img"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with serving(store.handle) as trap:
        with Half(tmp_path / "a", disk / "root") as half:
            async with half.client() as client:
                await client.pull(_reference(trap), unpack=True, snapshotter=OVERLAY)
                subprocess.run(["cp", "--sparse=always", image_file, left_file], check=True)
        left = mounts.mount(left_file, tmp_path / "left")
        for path in (left / "root").glob("*/metadata.db"):
            database = sqlite3.connect(path)
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)], path
            if path.parent.name == "snapshot":  # it is this boot still, which it would not be
                database.execute("UPDATE unsynced SET boot = 'the last one'")
                database.commit()
            database.close()
        with Half(tmp_path / "b", left / "root") as half:
            async with half.client() as client:
                (image,) = [Image(client, record) for record in (await client.images.walk()).items]
                assert (await image.state()).complete
                for blob in await walk(client.content.walk):
                    await client.content.verify(blob.digest)
                await image.unpack(OVERLAY)  # a layer that was not yet durable is made again
                await whole(client, half, chain)


async def test_a_disk_without_inodes(tmp_path: Path, mounts: Mounts) -> None:
    """A clear error, what is there stays readable, removing works, and with room again so does unpacking."""
    disk = mounts.mount(_make_disk(tmp_path, "128M", "-N", "8000"), tmp_path / "disk")
    fillers = disk / "fillers"
    fillers.mkdir()
    layout, chain = many()
    with Half(tmp_path, disk / "root") as half:
        async with half.client() as client:
            image = await bring(client, layout)
            other = Layout()
            other.name(other.image([tar_of({"small": b"x"})], HOST), full="docker.io/library/small:1")
            small = await bring(client, other)
            _take_inodes(fillers, leave=1500)
            with pytest.raises(ResourceExhausted):
                await image.unpack(OVERLAY)
            with pytest.raises(NotFound):
                await client.snapshots.stat(OVERLAY, chain)
            _take_inodes(fillers, leave=0)
            await client.content.verify((await small.resolve()).manifest.layers[0].digest)
            await small.delete(sync=True)
            assert [image.name for image in (await client.images.walk()).items] == [image.name]
            for path in fillers.iterdir():
                path.unlink()
            await image.unpack(OVERLAY)
            await whole(client, half, chain)


def _take_inodes(folder: Path, *, leave: int) -> None:
    free = os.statvfs(folder).f_favail - leave
    start = len(os.listdir(folder))
    for number in range(start, start + max(free, 0)):
        (folder / str(number)).touch()
