"""What the diff service must do, through its proxy: the right bytes onto the right directory, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import io
import os
import signal
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from contentd import Replica
from housebus import PATIENCE
from wherry_diff import pool
from wherry_diff.limits import Limits
from wherry_diff.pool import Pool
from wherry_diff.processors import Processor
from wherry_diff.service import PLAIN_LAYER, DiffService
from wherry_shared import context
from wherry_shared.api.content import Content, Located
from wherry_shared.api.diff import Diff
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.bus import Bus
from wherry_shared.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    Unknown,
)
from wherry_shared.streams import BlobWriter, write_blob
from wherry_shared.values import Descriptor, Mount

GZIP = PLAIN_LAYER + "+gzip"


def layer_of(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class House:
    """A content and a diff service on one bus."""

    def __init__(self, bus: Bus, root: Path, limits: Limits) -> None:
        self.bus, self.limits = bus, limits
        self.replica = Replica(bus, root / "content")
        self.spool = root / "spool"
        self.pool = Pool(2, self.spool)
        self.diff = bus.proxy(Diff, namespace="default")

    async def start(self) -> None:
        (self.spool.parent / "content").mkdir()
        self.spool.mkdir()
        await self.pool.start()
        await self.replica.start()
        self.service = DiffService(
            self.bus.proxy(Content), self.bus.proxy(Snapshots), self.pool, self.limits, self.spool
        )  # fmt: skip
        await self.bus.serve(self.service)

    async def stop(self) -> None:
        self.pool.close()
        await self.replica.stop()

    async def blob(self, data: bytes, media_type: str = GZIP) -> Descriptor:
        await write_blob(self.replica.content, digest_of(data), data, expected=digest_of(data))
        return Descriptor(media_type=media_type, digest=digest_of(data), size=len(data))


@pytest.fixture
async def house(bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    made = House(bus, tmp_path, Limits(max_bytes=1 << 20))
    await made.start()
    yield made
    await made.stop()


def bind(path: Path) -> list[Mount]:
    path.mkdir()
    return [Mount(type="bind", source=str(path), options=["rw", "rbind"])]


@pytest.mark.parametrize("media_type", [PLAIN_LAYER, GZIP])
async def test_apply_answers_the_diff_id(house: House, tmp_path: Path, media_type: str) -> None:
    plain = layer_of({"etc/motd": b"hello\n", "bin/tool": b"\x7fELF"})
    packed = gzip.compress(plain) if media_type == GZIP else plain
    mounts = bind(tmp_path / "target")
    applied = await house.diff.apply(await house.blob(packed, media_type), mounts)
    assert (applied.media_type, applied.digest, applied.size) == (PLAIN_LAYER, digest_of(plain), len(plain))
    assert (tmp_path / "target/etc/motd").read_bytes() == b"hello\n"


async def test_apply_writes_into_the_upper_directory_of_an_overlay(house: House, tmp_path: Path) -> None:
    for name in ("upper", "work", "lower"):
        (tmp_path / name).mkdir()
    options = [f"{key}dir={tmp_path / key}" for key in ("work", "upper", "lower")]
    overlay = [Mount(type="overlay", source="overlay", options=options)]
    await house.diff.apply(await house.blob(gzip.compress(layer_of({"a": b"x", ".wh.b": b""}))), overlay)
    assert (tmp_path / "upper/a").read_bytes() == b"x"
    assert list((tmp_path / "lower").iterdir()) == []


async def test_what_cannot_be_applied_is_refused(house: House, tmp_path: Path) -> None:
    layer = await house.blob(gzip.compress(layer_of({"a": b"x"})))
    read_only = [Mount(type="bind", source=str(tmp_path), options=["ro", "rbind"])]
    for mounts in ([], read_only, [Mount(type="erofs", source="/dev/loop0")], read_only * 2):
        with pytest.raises(Unimplemented):
            await house.diff.apply(layer, mounts)
    with pytest.raises(Unimplemented, match="application/x-unknown"):
        await house.diff.apply(layer.model_copy(update={"media_type": "application/x-unknown"}), bind(tmp_path / "t"))
    with pytest.raises(NotFound, match="sha256:0000"):
        await house.diff.apply(layer.model_copy(update={"digest": f"sha256:{'0' * 64}"}), bind(tmp_path / "u"))


async def test_bad_layers_are_told_apart(house: House, tmp_path: Path) -> None:
    whole = gzip.compress(layer_of({"a": os.urandom(1 << 16)}))
    with pytest.raises(DataLoss):
        await house.diff.apply(await house.blob(whole[: len(whole) // 2]), bind(tmp_path / "cut"))
    with pytest.raises(InvalidArgument):
        await house.diff.apply(await house.blob(gzip.compress(b"no tar" * 1000)), bind(tmp_path / "no"))
    with pytest.raises(ResourceExhausted):
        await house.diff.apply(await house.blob(gzip.compress(layer_of({"big": bytes(2 << 20)}))), bind(tmp_path / "b"))
    good = await house.blob(gzip.compress(layer_of({"a": b"x"})))
    assert (await house.diff.apply(good, bind(tmp_path / "good"))).size > 0


async def test_a_killed_worker_costs_one_call(house: House, tmp_path: Path) -> None:
    big = await house.blob(gzip.compress(layer_of({f"f{i}": b"" for i in range(900)}), 1))
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(Unavailable):
        await house.diff.apply(big, bind(tmp_path / "first"))
    await house.diff.apply(big, bind(tmp_path / "second"))
    assert len(list((tmp_path / "second").iterdir())) == 900


async def test_workers_without_work_go_and_come_again(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "IDLE_SECONDS", 0.0)
    layer = await house.blob(gzip.compress(layer_of({"a": b"x"})))
    for each in ("first", "second"):
        assert (await house.diff.apply(layer, bind(tmp_path / each))).size > 0
        async with asyncio.timeout(PATIENCE):
            while workers():
                await asyncio.sleep(0.01)


def workers() -> list[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(p) for p in children if _name(p).startswith("wherry-diff-wrk")]


def _name(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""  # it has just ended


async def test_bytes_that_are_not_on_this_host_come_over_the_bus(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = await house.blob(gzip.compress(layer_of({"a": b"remote"})))
    elsewhere = Located(path="/nonexistent", size=layer.size, device=0, inode=0)

    async def locate(digest: str) -> Located:
        return elsewhere

    monkeypatch.setattr(house.replica.service, "locate", locate)
    assert house.replica.server is not None
    house.replica.server._methods["locate"] = locate
    await house.diff.apply(layer, bind(tmp_path / "target"))
    assert (tmp_path / "target/a").read_bytes() == b"remote"
    assert list(house.spool.iterdir()) == []


def tree_of(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def mounts_of(path: Path) -> list[Mount]:
    return [Mount(type="bind", source=str(path), options=["ro", "rbind"])]


@pytest.mark.parametrize("suffix", ["", "+gzip", "+zstd"])
async def test_compare_commits_a_layer_that_apply_reads(house: House, tmp_path: Path, suffix: str) -> None:
    left = tree_of(tmp_path / "left", {"same": b"s", "gone": b"g"})
    right = tree_of(tmp_path / "right", {"same": b"s", "new/file": os.urandom(300_000)})
    os.utime(right / "same", ns=(5, (left / "same").stat().st_mtime_ns))
    layer = await house.diff.compare(mounts_of(left), mounts_of(right), PLAIN_LAYER + suffix, labels={"a": "b"})
    info = await house.replica.content.info(layer.digest)
    assert (layer.media_type, layer.size) == (PLAIN_LAYER + suffix, info.size)
    assert info.labels["a"] == "b"
    applied = await house.diff.apply(layer, [Mount(type="bind", source=str(left), options=["rw"])], sync_fs=True)
    assert info.labels.get("containerd.io/uncompressed") == (applied.digest if suffix else None)
    assert sorted(p.name for p in left.rglob("*")) == ["file", "new", "same"]
    assert (left / "new/file").read_bytes() == (right / "new/file").read_bytes()
    assert (await house.diff.changes(mounts_of(left), mounts_of(right))).items == []
    assert list(house.spool.iterdir()) == [] and await house.replica.content.statuses() == []


async def test_a_blob_that_was_there_gets_the_label_too(house: House, tmp_path: Path) -> None:
    right = tree_of(tmp_path / "right", {"a": b"x"})
    first = await house.diff.compare([], mounts_of(right), source_date_epoch=0)
    content = house.replica.content
    diff_id = (await content.info(first.digest)).labels["containerd.io/uncompressed"]
    await content.update(first.digest, {}, ["labels"])
    again = await house.diff.compare([], mounts_of(right), source_date_epoch=0, labels={"c": "d"})
    assert again == first
    assert (await content.info(first.digest)).labels == {"containerd.io/uncompressed": diff_id, "c": "d"}
    assert await content.statuses() == []


async def test_a_given_ref_starts_over_and_keeps_its_ingest_when_it_fails(house: House, tmp_path: Path) -> None:
    right = tree_of(tmp_path / "right", {"a": os.urandom(100_000)})
    async with BlobWriter(house.replica.content, "mine") as writer:
        await writer.write(b"left over")
    layer = await house.diff.compare([], mounts_of(right), ref="mine")
    assert (await house.replica.content.info(layer.digest)).size == layer.size
    (right / ".wh.b").write_text("")
    for ref, left in (("", []), ("mine", ["mine"])):
        with pytest.raises(FailedPrecondition, match=r"\.wh\.b"):
            await house.diff.compare([], mounts_of(right), ref=ref)
        assert [ingest.ref for ingest in await house.replica.content.statuses()] == left


async def test_what_cannot_be_compared_is_refused(house: House, tmp_path: Path) -> None:
    right = mounts_of(tree_of(tmp_path / "right", {"a": b"x"}))
    with pytest.raises(Unimplemented, match="x-foreign"):
        await house.diff.compare([], right, "application/x-foreign")
    for epoch in (-1, 1 << 62):
        with pytest.raises(InvalidArgument, match="source_date_epoch"):
            await house.diff.compare([], right, source_date_epoch=epoch)
    with pytest.raises(InvalidArgument):
        await house.diff.compare(right, [])
    with pytest.raises(NotFound):
        await house.diff.compare([], mounts_of(tmp_path / "none"))
    with pytest.raises(Unimplemented, match="nosuchfs"):
        await house.diff.compare([], [Mount(type="nosuchfs", source="x")])
    with pytest.raises(InvalidArgument, match="after"):
        await house.diff.changes([], right, after="no hex")
    assert await house.replica.content.statuses() == []


async def test_changes_come_in_pages(house: House, tmp_path: Path) -> None:
    left = mounts_of(tree_of(tmp_path / "left", {"d/gone": b""}))
    right = mounts_of(tree_of(tmp_path / "right", {f"d/f{i}": b"" for i in range(9)}))
    found: list[str] = []
    after = ""
    while True:
        page = await house.diff.changes(left, right, after, 3)
        assert len(page.items) <= 3
        found += [f"{change.kind} {change.path}" for change in page.items]
        after = page.next
        if not after:
            break
    assert found == ["C /d", *(f"A /d/f{i}" for i in range(9)), "D /d/gone"]


async def test_a_killed_worker_costs_one_comparison(house: House, tmp_path: Path) -> None:
    right = mounts_of(tree_of(tmp_path / "right", {"a": os.urandom(1 << 19)}))
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(Unavailable):
        await house.diff.compare([], right)
    assert (await house.diff.compare([], right)).size > 1 << 19
    assert list(house.spool.iterdir()) == [] and await house.replica.content.statuses() == []


async def test_who_stops_waiting_leaves_nothing_behind(house: House, tmp_path: Path) -> None:
    with open(tree_of(tmp_path / "right", {}) / "big", "wb") as file:
        file.truncate(1 << 19)
    house.service._limits = Limits()
    with open(tmp_path / "right/big", "wb") as file:
        file.truncate(30 << 30)
    with pytest.raises(DeadlineExceeded), context.use(timeout=0.5):
        await house.diff.compare([], mounts_of(tmp_path / "right"), PLAIN_LAYER)
    for _ in range(20 * PATIENCE):
        if not list(house.spool.iterdir()) and not await house.replica.content.statuses():
            break
        await asyncio.sleep(0.05)
    assert list(house.spool.iterdir()) == [] and await house.replica.content.statuses() == []


async def test_processors_stand_between_a_foreign_layer_and_the_mounts(house: House, tmp_path: Path) -> None:
    foreign = "application/x-reversed"
    script = "exec python3 -c 'import sys; sys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])'"
    house.service._processors = (Processor("rev", (foreign,), GZIP, "sh", ("-c", script)),)
    plain = layer_of({"a": b"x" * 100_000})
    layer = await house.blob(gzip.compress(plain)[::-1], foreign)
    applied = await house.diff.apply(layer, bind(tmp_path / "target"), payloads={"rev": b"\0"})
    assert (applied.digest, applied.media_type) == (digest_of(plain), PLAIN_LAYER)
    house.service._processors = (Processor("rev", (foreign,), GZIP, "false"),)
    with pytest.raises(Unknown, match="rev"):
        await house.diff.apply(layer, bind(tmp_path / "again"))
