"""The whole pipeline: digests, sizes, what is left behind when it fails, and full disks."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import zstandard
from wherry_diff.ahead import Ahead
from wherry_diff.apply import Application, Applied, apply, run
from wherry_diff.extract import Target
from wherry_diff.limits import Limits
from wherry_shared.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    WherryError,
)
from wherry_shared.values import Mount

from .conftest import Place
from .layers import DIR, FILE, TAR, archive, entry, look, put

BODY = os.urandom(3_000_000)
FILES = [entry(b"d/f%d" % at, FILE, b"x" * 7 * at) for at in range(300)]
LAYER = archive(entry(b"d", DIR), entry(b"d/big", FILE, BODY), *FILES)
PACKED = gzip.compress(LAYER, 1)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstd], ids=["tar", "gzip", "zstd"])
def test_digest_size_and_tree(place: Place, pack: Callable[[bytes], bytes]) -> None:
    applied = apply(io.BytesIO(pack(LAYER)), TAR + "+gzip", Target(str(place.root), place.overlay))
    assert applied == Applied(f"sha256:{hashlib.sha256(LAYER).hexdigest()}", len(LAYER), 302)
    assert (place.root / "d" / "big").read_bytes() == BODY
    assert [(place.root / "d" / f"f{at}").stat().st_size for at in range(300)] == list(range(0, 2100, 7))


@pytest.mark.parametrize("tail", [b"\0" * 9216, b"garbage", b"x" * 1_000_000], ids=["zeros", "garbage", "long"])
def test_the_digest_covers_what_follows_the_archive(place: Place, tail: bytes) -> None:
    applied = apply([gzip.compress(LAYER + tail, 1)], TAR, Target(str(place.root), place.overlay))
    assert applied.diff_id == f"sha256:{hashlib.sha256(LAYER + tail).hexdigest()}"
    assert applied.size == len(LAYER) + len(tail)


def test_an_empty_layer(place: Place) -> None:
    assert put(b"", place.root, overlay=place.overlay) == Applied(f"sha256:{hashlib.sha256().hexdigest()}", 0, 0)
    assert put(archive(), place.root, overlay=place.overlay).size == 1024


class Failing:
    """Half of a layer, then an error."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __iter__(self) -> Iterator[bytes]:
        yield PACKED[: len(PACKED) // 2]
        raise self._error


class Interrupted(BaseException):
    """As a cancellation is, no `Exception`."""


@pytest.mark.parametrize(
    ("source", "media_type", "limits", "expected"),
    [
        ([PACKED[:-100]], TAR, Limits(), DataLoss),
        ([gzip.compress(LAYER[:1_000_000])], TAR, Limits(), InvalidArgument),
        ([gzip.compress(b"no archive" * 100_000)], TAR, Limits(), InvalidArgument),
        ([PACKED], "text/plain", Limits(), Unimplemented),
        ([PACKED], TAR, Limits(max_bytes=2_000_000), ResourceExhausted),
        ([PACKED], TAR, Limits(max_entries=100), ResourceExhausted),
        (Failing(ConnectionResetError("by peer")), TAR, Limits(), Unavailable),
        (Failing(ValueError("of the source")), TAR, Limits(), ValueError),
        (Failing(Interrupted()), TAR, Limits(), Interrupted),
    ],
)
def test_errors_leave_nothing_behind(
    place: Place, source: Iterable[bytes], media_type: str, limits: Limits, expected: type[BaseException]
) -> None:
    """`place` looks for descriptors and threads."""
    with pytest.raises(expected):
        apply(source, media_type, Target(str(place.root), place.overlay), limits)


def test_a_missing_root_is_told_before_the_layer_is_read_to_its_end(tmp_path: Path) -> None:
    taken = 0

    def source() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield entry(b"f%d" % taken, FILE, bytes(100_000))

    with pytest.raises(NotFound):
        apply(source(), TAR, Target(str(tmp_path / "none"), overlay=True))
    assert taken < 100


def test_the_reader_keeps_a_bounded_distance() -> None:
    """A slow disk must not make a fast source fill the memory."""
    taken = 0

    def source() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"piece"

    with Ahead(source(), 4) as pieces:
        assert next(pieces) == b"piece"
        while taken < 5:
            time.sleep(0.001)
        time.sleep(0.05)
        assert taken == 5  # one taken, three that wait, one in the hands of the thread


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    at = tmp_path / "small"
    at.mkdir()

    def mount(options: str) -> Path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", at], check=True)
        return at

    yield mount
    subprocess.run(["umount", at], check=True)


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ("size=1m", LAYER),
        ("nr_inodes=50", LAYER),
        ("nr_inodes=20", archive(*(entry(b"d%d" % at, DIR) for at in range(50)))),
        ("nr_inodes=20", archive(entry(b"d/" * 50 + b"f"))),
        ("nr_inodes=20", archive(*(entry(b"s%d" % at, b"2", link=b"x") for at in range(50)))),
        ("nr_inodes=20", archive(*(entry(b"p%d" % at, b"6") for at in range(50)))),
        ("nr_inodes=20", archive(*(entry(b".wh.f%d" % at) for at in range(50)))),
    ],
)
def test_a_full_disk_is_named(small: Callable[[str], Path], options: str, layer: bytes) -> None:
    with pytest.raises(ResourceExhausted, match="No space left on device"):
        put(layer, small(options))


def test_a_read_only_disk_is_our_error_too(small: Callable[[str], Path]) -> None:
    with pytest.raises(WherryError, match="Read-only"):
        put(LAYER, small("ro"))


def test_the_same_layer_twice_is_the_same_tree(tmp_path: Path) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        root.mkdir()
        put(LAYER, root)
    one, two = (look(root) for root in roots)
    one.pop(b""), two.pop(b"")
    assert one == two and len(one) == 302


def test_a_blob_that_was_unpacked_leaves_the_page_cache(tmp_path: Path) -> None:
    size = 32 << 20
    blob, tree = tmp_path / "blob", tmp_path / "tree"
    tree.mkdir()
    blob.write_bytes(archive(entry(b"large", FILE, os.urandom(size))))
    with blob.open("rb") as file:
        os.fsync(file.fileno())
    assert cached(blob) > size // 2
    mounts = (Mount(type="bind", source=str(tree), options=["rw"]),)
    job = Application(str(blob), "application/vnd.oci.image.layer.v1.tar", mounts, str(tmp_path))
    assert run(job).entries == 1
    assert (tree / "large").stat().st_size == size
    assert cached(blob) <= size // 2  # the last of it, and what somebody else may have in hand


def cached(path: Path) -> int:
    """How many bytes of a file are in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)
