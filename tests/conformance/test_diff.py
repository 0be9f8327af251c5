"""What the diff service must do, through its proxy: the right bytes onto the right directory, and nothing else."""

from __future__ import annotations

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
from wherry_diff.limits import Limits
from wherry_diff.pool import Pool
from wherry_diff.service import PLAIN_LAYER, DiffService
from wherry_shared.api.content import Located
from wherry_shared.api.diff import Diff
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.bus import Bus
from wherry_shared.errors import DataLoss, InvalidArgument, NotFound, ResourceExhausted, Unavailable, Unimplemented
from wherry_shared.streams import write_blob
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
        service = DiffService(
            self.replica.content, self.bus.proxy(Snapshots), self.pool, self.limits, self.spool
        )  # fmt: skip
        await self.bus.serve(service)

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


def workers() -> list[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(p) for p in children if Path(f"/proc/{p}/comm").read_text().startswith("wherry-diff-wrk")]


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
