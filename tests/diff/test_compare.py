"""A layer made of how two trees differ makes the one of the other, whatever was done to it."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import itertools
import os
import socket
import stat
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest
import zstandard
from descriptors import descriptors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wherry_diff.apply import Application, apply, run
from wherry_diff.changes import open_file
from wherry_diff.compare import Comparison, Redo, compare, upper_alone
from wherry_diff.extract import Target
from wherry_diff.limits import Limits
from wherry_shared.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from wherry_shared.values import Mount

from .layers import FILE, LINK, TAR, archive, entry, look, put
from .test_roundtrip import rich_tree
from .trees import OPS, Ground, Op, bind, listed, made, play, seen

_numbers = itertools.count()
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.fixture(params=["overlay", "plain", "btrfs"])
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def base(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Where trees may be made."""
    return request.getfixturevalue("btrfs") if kind == "btrfs" else tmp_path


def unzstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(data).read()


def mounts(base: Path) -> list[str]:
    """What is mounted below it: beside it others mount and unmount."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(base) in line]


def ground(base: Path, kind: str, first: list[Op]) -> Ground:
    return Ground(base / f"ground-{os.getpid()}-{next(_numbers)}", kind, first)


@settings(max_examples=50, deadline=None, suppress_health_check=SLOW)
@given(first=st.lists(OPS, max_size=25), then=st.lists(OPS, max_size=15), epoch=st.sampled_from([None, 1_600_000_000]))
def test_the_layer_makes_the_right_tree(
    base: Path, kind: str, first: list[Op], then: list[Op], epoch: int | None
) -> None:
    with ground(base, kind, first) as made_of:
        play(made_of.right, then)
        expected = seen(made_of.right)
        for whole in (False, True) if kind == "overlay" else (True,):
            layer = made_of.layer(whole=whole)
            assert made_of.layer(whole=whole) == layer
            for onto_overlay in (False, True):
                with made_of.applied(layer, onto_overlay=onto_overlay) as place:
                    assert seen(place) == expected
                    assert listed(Comparison(bind(place), bind(made_of.right), TAR, str(base))) == []
            if epoch is not None:
                bounded = made_of.layer(whole=whole, epoch=epoch)
                with tarfile.open(fileobj=io.BytesIO(bounded)) as tar:
                    assert all(m.mtime <= epoch and m.mtime == int(m.mtime) for m in tar)


@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
@given(first=st.lists(OPS, max_size=25), then=st.lists(OPS, max_size=15), limit=st.integers(1, 5))
def test_the_list_is_what_happened_and_pages_fit_together(
    base: Path, kind: str, first: list[Op], then: list[Op], limit: int
) -> None:
    with ground(base, kind, first) as made_of:
        before = seen(made_of.left)
        play(made_of.right, then)
        after = seen(made_of.right)
        found = listed(made_of.job())
        assert listed(made_of.job(), limit) == found
        paths = [path for _, path in found]
        assert paths == sorted(set(paths), key=lambda path: path.split(b"/"))
        told = {path: what for what, path in found}
        for name in after.keys() - before.keys():
            assert told[name] == "A"
        for name in after.keys() & before.keys():
            assert told.get(name, "C") == "C"
            assert after[name] == before[name] or name in told or after[name][7] != before[name][7]
        gone = before.keys() - after.keys()
        assert {path for path, what in told.items() if what == "D"} == {
            name for name in gone if name.rpartition(b"/")[0] not in gone and _is_directory(after, name)
        }


def _is_directory(tree: dict[bytes, tuple[object, ...]], name: bytes) -> bool:
    above = name.rpartition(b"/")[0]
    return not above or (above in tree and int(str(tree[above][0])) & 0o170000 == 0o040000)


def test_everything_that_a_layer_can_hold(base: Path, kind: str) -> None:
    with ground(base, kind, []) as made_of:
        rich_tree(made_of.right)
        layer = made_of.layer(whole=False)
        with made_of.applied(layer, onto_overlay=kind == "overlay") as place:
            assert seen(place) == seen(made_of.right)


def test_others_read_it_too(tmp_path: Path) -> None:
    """GNU tar makes the same tree of it."""
    right, other = tmp_path / "right", tmp_path / "other"
    right.mkdir()
    other.mkdir()
    rich_tree(right)
    _, layer = made(Comparison((), bind(right), TAR, str(tmp_path)))
    subprocess.run(
        ["tar", "-C", other, "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", "-"], check=True, input=layer
    )
    assert seen(other) == seen(right)


@pytest.mark.parametrize(
    ("suffix", "unpack"),
    [
        ("", bytes),
        ("+gzip", gzip.decompress),
        ("+zstd", lambda d: zstandard.ZstdDecompressor().stream_reader(d).read()),
    ],
)
def test_digests_and_sizes(tmp_path: Path, suffix: str, unpack: object) -> None:
    right = tmp_path / "right"
    right.mkdir()
    rich_tree(right)
    answer, layer = made(Comparison((), bind(right), TAR + suffix, str(tmp_path)))
    assert made(Comparison((), bind(right), TAR + suffix, str(tmp_path)))[1] == layer
    plain = unpack(layer)  # type: ignore[operator]
    assert (answer.digest, answer.size) == (f"sha256:{hashlib.sha256(layer).hexdigest()}", len(layer))
    assert (answer.diff_id, answer.archive_size) == (f"sha256:{hashlib.sha256(plain).hexdigest()}", len(plain))
    place = tmp_path / "place"
    place.mkdir()
    assert apply([layer], TAR + suffix, Target(str(place), overlay=False)).diff_id == answer.diff_id


def test_the_same_tree_elsewhere_and_later_gives_the_same_bytes(tmp_path: Path) -> None:
    layers = []
    for name in ("one", "two"):
        tree = tmp_path / name
        tree.mkdir()
        play(tree, [("write", b"b/file", b"x"), ("mkdir", b"a"), ("link", b"a/hard", b"b/file")])
        layers.append(made(Comparison((), bind(tree), TAR + "+gzip", str(tmp_path), 1_000_000_000))[1])
        time.sleep(0.01)
    assert layers[0] == layers[1]


def test_a_link_to_an_unchanged_file_brings_the_whole_group(base: Path, kind: str) -> None:
    first: list[Op] = [("write", b"z/one", b"data"), ("link", b"a", b"z/one"), ("write", b"m", b"alone")]
    with ground(base, kind, first) as made_of:
        play(made_of.right, [("link", b"n", b"a")])
        layer = made_of.layer(whole=False)
        with made_of.applied(layer, onto_overlay=False) as place:
            assert seen(place) == seen(made_of.right)


def test_links_that_part_and_meet_are_seen_though_nothing_else_changed(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    for tree, links in ((left, [(b"b", b"a"), (b"d", b"c")]), (right, [(b"c", b"a"), (b"d", b"b")])):
        tree.mkdir()
        for name in (b"a", b"b", b"c", b"d"):
            play(tree, [("write", name, b"same")])
        for one, other in links:
            os.unlink(os.path.join(os.fsencode(tree), one))
            play(tree, [("link", one, other)])
        play(tree, [("utime", name, 5) for name in (b"a", b"b", b"c", b"d")])
    _, layer = made(Comparison(bind(left), bind(right), TAR, str(tmp_path)))
    put(layer, left, overlay=False)
    assert seen(left) == seen(right)


def test_content_is_compared_where_times_are_whole_seconds(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    for tree, body in ((left, b"one"), (right, b"two")):
        tree.mkdir()
        for name, at in ((b"whole", 10**18), (b"fraction", 10**18 + 1)):
            play(tree, [("write", name, body), ("utime", name, at)])
    assert listed(Comparison(bind(left), bind(right), TAR, str(tmp_path))) == [("C", b"whole")]


def test_what_no_layer_can_hold(tmp_path: Path) -> None:
    right = tmp_path / "right"
    right.mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(right / "socket"))
    os.mknod(right / "whiteout", 0o020000, 0)
    assert listed(Comparison((), bind(right), TAR, str(tmp_path))) == []
    (right / ".wh.passwd").write_text("")
    with pytest.raises(FailedPrecondition, match=r"\.wh\.passwd"):
        made(Comparison((), bind(right), TAR, str(tmp_path)))
    (right / ".wh.passwd").unlink()
    (right / "f").write_text("")
    os.setxattr(right / "f", "user.a=b", b"")
    with pytest.raises(FailedPrecondition, match=r"user\.a=b"):
        made(Comparison((), bind(right), TAR, str(tmp_path)))


def test_the_deepest_tree_that_a_layer_can_have(tmp_path: Path) -> None:
    """Deeper than the interpreter's recursion, and more than directories are kept open."""
    left, right, place = tmp_path / "left", tmp_path / "right", tmp_path / "place"
    for tree in (left, right, place):
        tree.mkdir()
    for tree in (left, right):
        put(b"".join([entry(b"d/" * 2000 + b"f", mtime=5), bytes(1024)]), tree, overlay=False)
    put(b"".join([entry(b"d/" * 2000 + b"g"), entry(b"d/" * 1000 + b"h"), bytes(1024)]), right, overlay=False)
    opened = descriptors()
    limits = Limits(max_path=4095)
    job = Comparison(bind(left), bind(right), TAR, str(tmp_path), limits=limits)
    told = {path for _, path in listed(job, 700)}
    assert {b"d/" * 2000 + b"g", b"d/" * 1000 + b"h"} <= told
    _, layer = made(job)
    put(layer, left, overlay=False)
    assert listed(job) == []
    fd = os.open(right, os.O_RDONLY)
    for _ in range(4100):
        with_suppress = os.open(b"d", os.O_RDONLY, dir_fd=fd) if _exists(fd) else _make(fd)
        os.close(fd)
        fd = with_suppress
    os.close(fd)
    with pytest.raises(ResourceExhausted, match="too long a path"):
        made(job)
    assert not descriptors() - opened
    subprocess.run(["rm", "-rf", left, right], check=True)


def _exists(fd: int) -> bool:
    return "d" in os.listdir(fd)


def _make(fd: int) -> int:
    os.mkdir(b"d", dir_fd=fd)
    return os.open(b"d", os.O_RDONLY, dir_fd=fd)


def test_bounds(tmp_path: Path) -> None:
    right = tmp_path / "right"
    right.mkdir()
    for number in range(20):
        (right / f"f{number}").write_bytes(bytes(10_000))
    with open(right / "sparse", "wb") as file:
        file.truncate(1 << 42)
    for limits in (Limits(max_entries=10), Limits(max_bytes=100_000), Limits()):
        with pytest.raises(ResourceExhausted):
            made(Comparison((), bind(right), TAR, str(tmp_path), limits=limits))
    with pytest.raises(DeadlineExceeded):
        made(Comparison((), bind(right), TAR, str(tmp_path), deadline=time.time() - 1))
    with pytest.raises(Unimplemented):
        made(Comparison((), bind(right), TAR + "+lz4", str(tmp_path)))
    with pytest.raises(NotFound, match="nowhere"):
        made(Comparison((), bind(tmp_path / "nowhere"), TAR, str(tmp_path)))


def test_a_tree_that_changes_meanwhile(tmp_path: Path) -> None:
    """Files come, go, grow and shrink: the archive is whole, or the comparison says why not."""
    right = tmp_path / "right"
    right.mkdir()
    stop = threading.Event()

    def churn() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            play(right, [("write", b"d%d/f" % (number % 7), b"x" * (number * 70_001 % 900_000)),
                         ("rename", b"d%d" % (number % 5), b"e"), ("remove", b"e"), ("remove", b"d3"),
                         ("symlink", b"d3", b"/etc")])  # fmt: skip

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        whole = 0
        for _ in range(150):
            try:
                _, layer = made(Comparison((), bind(right), TAR, str(tmp_path)))
            except Aborted:
                continue
            whole += 1
            with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
                assert not any(m.name.startswith("d3/") and "passwd" in m.name for m in tar)
    finally:
        stop.set()
        thread.join()
    assert whole


def test_a_mount_in_the_tree_is_not_entered(tmp_path: Path) -> None:
    right = tmp_path / "right"
    (right / "at").mkdir(parents=True)
    subprocess.run(["mount", "--bind", "/etc", right / "at"], check=True)
    try:
        assert listed(Comparison((), bind(right), TAR, str(tmp_path))) == []
    finally:
        subprocess.run(["umount", right / "at"], check=True)


def test_nothing_is_left_mounted(tmp_path: Path) -> None:
    with ground(tmp_path, "overlay", [("write", b"a", b"x")]) as made_of:
        play(made_of.right, [("write", b"b", b"y"), ("remove", b"a")])
        before, opened = mounts(tmp_path), descriptors()
        made_of.layer(whole=True)
        assert mounts(tmp_path) == before
        assert not descriptors() - opened


def test_a_hundred_and_twenty_eight_layers(tmp_path: Path) -> None:
    base = tmp_path / ("long" * 20)
    base.mkdir()
    lower = [base / f"layer-{number}" for number in range(128)]
    for number, layer in enumerate(lower):
        layer.mkdir()
        (layer / f"f{number}").write_text("x")
    options = [f"lowerdir={':'.join(map(str, lower))}", "index=off"]
    view = (Mount(type="overlay", source="overlay", options=options),)
    assert len(listed(Comparison((), view, TAR, str(tmp_path)))) == 128
    one_less = (Mount(type="overlay", source="overlay", options=[f"lowerdir={':'.join(map(str, lower[1:]))}"]),)
    assert upper_alone(one_less, view) is not None
    assert listed(Comparison(one_less, view, TAR, str(tmp_path))) == [("A", b"f0")]


def test_redirected_directories_are_found_out(tmp_path: Path) -> None:
    """With redirect_dir a moved directory is a mark in the upper directory: it alone does not say what is there."""
    with ground(tmp_path, "plain", [("write", b"a/b/c", b"data")]) as made_of:
        for path in (made_of.upper, made_of.work, made_of.base / "at"):
            path.mkdir()
        options = [f"workdir={made_of.work}", f"upperdir={made_of.upper}", f"lowerdir={made_of.left}",
                   "redirect_dir=on", "index=off"]  # fmt: skip
        at = made_of.base / "at"
        subprocess.run(["mount", "-t", "overlay", "-o", ",".join(options), "overlay", at], check=True)
        try:
            os.rename(at / "a", at / "moved")
            expected = seen(at)
            job = Comparison(
                bind(made_of.left), (Mount(type="overlay", source="overlay", options=options),), TAR, str(tmp_path)
            )
            assert isinstance(compare(job, lambda data: None), Redo)
            _, layer = made(job)
            assert ("A", b"moved/b/c") in listed(job) and ("D", b"a") in listed(job)
        finally:
            subprocess.run(["umount", at], check=True)
        put(layer, made_of.left, overlay=False)
        assert seen(made_of.left) == expected


def test_opaque_directories_hide_by_name(tmp_path: Path) -> None:
    first: list[Op] = [("write", b"d/a", b"1"), ("write", b"d/b/c", b"2"), ("write", b"e/f", b"3")]
    with ground(tmp_path, "overlay", first) as made_of:
        play(made_of.right, [("remove", b"d"), ("mkdir", b"d"), ("write", b"d/b/x", b"new")])
        assert listed(made_of.job()) == [
            ("C", b"d"), ("D", b"d/a"), ("C", b"d/b"), ("D", b"d/b/c"), ("A", b"d/b/x")
        ]  # fmt: skip
        with tarfile.open(fileobj=io.BytesIO(made_of.layer(whole=False))) as tar:
            assert [m.name for m in tar] == ["d", "d/.wh.a", "d/b", "d/b/.wh.c", "d/b/x"]
            assert all(m.size == m.mtime == 0 for m in tar if ".wh." in m.name)
        assert look(made_of.left)


def test_owners_of_a_mapped_container_are_its_own(tmp_path: Path) -> None:
    with ground(tmp_path, "overlay", [("write", b"a", b"x")]) as made_of:
        play(made_of.right, [("write", b"in", b"x"), ("chown", b"in", 100_000, 200_005), ("remove", b"a"),
                             ("write", b"out", b"x"), ("chown", b"out", 5, 200_000)])  # fmt: skip
        left, (right,) = made_of.mounts
        mapped = right.model_copy(
            update={"options": ["uidmap=0:100000:65536", "gidmap=0:200000:65536", *right.options]}
        )
        _, layer = made(Comparison(left, (mapped,), TAR, str(tmp_path)))
        with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
            assert {m.name: (m.uid, m.gid) for m in tar} == {".wh.a": (0, 0), "in": (0, 5), "out": (65534, 0)}
        with pytest.raises(Unimplemented, match="id mappings"):
            made(Comparison((), (mapped,), TAR, str(tmp_path)))


@pytest.fixture
def images(tmp_path: Path) -> tuple[list[Mount], list[Path]]:
    """Two layers as EROFS images, the upper one first, and the trees that they hold."""
    trees = [tmp_path / "two", tmp_path / "one"]
    for tree in trees:
        tree.mkdir()
    play(trees[1], [("write", b"a", b"1"), ("write", b"d/x", b"x" * 5000), ("write", b"gone", b"g"), ("mkdir", b"e")])
    play(trees[0], [("write", b"b", b"2"), ("link", b"c", b"b"), ("write", b"d/y", b"y")])
    os.mknod(trees[0] / "gone", 0o020000, 0)
    mounts = []
    for tree in trees:
        done = subprocess.run(["mkfs.erofs", "--quiet", f"{tree}.erofs", tree], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        mounts.append(Mount(type="erofs", source=f"{tree}.erofs", options=["ro"]))
    return mounts, trees


def test_layers_that_are_images(images: tuple[list[Mount], list[Path]], tmp_path: Path) -> None:
    """As the erofs snapshotter gives them: images, and an overlay that names them by their numbers."""
    below, trees = images
    lower = "lowerdir={{ overlay 0 1 }}"
    view = (*below, Mount(type="format/overlay", source="overlay", options=[lower, "index=off"]))
    at = str(tmp_path / "at")  # apart from the images: a tmpfs covers it for the time of the mount
    for path in ("upper", "work", "at"):
        (tmp_path / path).mkdir()
    own = [f"workdir={tmp_path}/work", f"upperdir={tmp_path}/upper"]
    active = (*below, Mount(type="format/overlay", source="overlay", options=[*own, lower, "index=off"]))
    first = archive(entry(b"d/z", FILE, b"z"), entry(b".wh.a"), entry(b"h", LINK, link=b"b"))
    blob = tmp_path / "blob"
    blob.write_bytes(first)
    run(Application(str(blob), TAR, active, at))
    assert (tmp_path / "upper/d").stat().st_mtime_ns == (trees[0] / "d").stat().st_mtime_ns  # it is as in the image
    expected = [("D", b"a"), ("C", b"b"), ("C", b"d"), ("A", b"d/z"), ("A", b"h")]
    alone = upper_alone(view, active)
    assert alone is not None and alone[0] == f"{tmp_path}/upper" and alone[1] == below
    assert listed(Comparison(view, active, TAR, at)) == expected
    before = mounts(tmp_path)
    whole = [made(Comparison(view, active, TAR, at), whole=each)[1] for each in (False, True)]
    for layer in whole:
        with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
            assert {m.name for m in tar} >= {".wh.a", "d", "d/z", "h"}
    assert listed(Comparison((below[1],), view, TAR, at)) == [
        ("A", b"b"), ("A", b"c"), ("C", b"d"), ("A", b"d/y"), ("D", b"gone")
    ]  # fmt: skip
    assert listed(Comparison((), (below[1],), TAR, at))[0] == ("A", b"a")
    assert mounts(tmp_path) == before
    for bad in ("lowerdir={{ overlay 0 2 }}", "lowerdir={{ mount 0 }}"):
        with pytest.raises(InvalidArgument):
            over = Mount(type="format/overlay", source="overlay", options=[bad])
            listed(Comparison((), (*below, over), TAR, at))
    with pytest.raises(Unimplemented, match="read-only"):
        run(Application(str(blob), TAR, (below[0],), at))


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    """What a running container puts in a file's place is not touched: a FIFO's writer would notice, a device act."""
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_bytes(b"x")
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        fd = open_file(b"file", directory)
        assert os.read(fd, 2) == b"x"
        os.close(fd)
        for name in (b"fifo", b"device", b"link", b"."):
            with pytest.raises(OSError) as refused:
                open_file(name, directory)
            assert refused.value.errno == errno.ESTALE
        with pytest.raises(OSError):  # nobody has it open for reading
            os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    finally:
        os.close(directory)
