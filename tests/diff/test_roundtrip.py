"""The same tree as GNU tar makes, from the archives that GNU tar and this suite write."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from wherry_diff.apply import apply
from wherry_diff.extract import Target

from .conftest import Place
from .layers import DIR, FILE, LINK, SYMLINK, TAR, archive, entry, look, put

# Revision 2, effective, cap_net_raw permitted: what the kernel takes as security.capability.
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


def rich_tree(top: Path) -> None:
    """One of everything that a layer can hold."""
    root = os.fsencode(top)

    def path(name: bytes) -> bytes:
        return os.path.join(root, name)

    for directory, mode in ((b"bin", 0o755), (b"shared", 0o2775), (b"tmp", 0o1777), (b"private", 0o700), (b"none", 0)):
        os.mkdir(path(directory))
        os.chown(path(directory), 0, 50 if directory == b"shared" else 0)
        os.chmod(path(directory), mode)
    os.mkdir(path(b"shared/below"), 0o755)
    for name, mode, owner, body in (
        (b"bin/su", 0o4755, (0, 0), b"\x7fELF" * 1000), (b"bin/wall", 0o2755, (0, 5), b"x"),
        (b"shared/file", 0o664, (1000, 1000), b"inherits no group"), (b"shared/own", 0o644, (0, 0), b""),
        (b"private/big", 0o600, (0, 0), os.urandom(3_000_001)), (b"tmp/odd", 0o7777, (4_000_000, 65534), b"y" * 512),
        (b"none/" + b"n" * 255, 0o000, (0, 0), b"hidden"), ("bin/grün→".encode(), 0o644, (0, 0), b"u"),
        (b"bin/\xff\xfe\n\t\"' \\", 0o644, (0, 0), b"bytes"), (b"-rf", 0o644, (0, 0), b""), (b"bin/*", 0o644, (0, 0),
        b""),
        (b"bin/..dots..", 0o644, (0, 0), b"."),
    ):  # fmt: skip
        with open(path(name), "wb") as file:
            file.write(body)
        os.chown(path(name), *owner)
        os.chmod(path(name), mode)
    deep = b"/".join([b"deep" * 20] * 20)
    os.makedirs(path(deep))
    with open(path(deep + b"/file"), "wb") as file:
        file.write(b"deep")
    with open(path(b"tmp/sparse"), "wb") as file:
        file.seek(1 << 20)
        file.write(b"data")
        file.truncate(2 << 20)
    os.link(path(b"bin/su"), path(b"bin/hard"))
    os.link(path(b"bin/su"), path(b"zlast"))
    os.symlink(b"/etc/passwd", path(b"absolute"))
    os.symlink(b"../" * 50 + b"t" * 200, path(b"bin/long"))
    os.symlink(b"nowhere", path(b"dangling"))
    os.link(path(b"dangling"), path(b"dangling2"), follow_symlinks=False)
    os.chown(path(b"dangling"), 7, 8, follow_symlinks=False)
    os.mkfifo(path(b"fifo"))
    os.chmod(path(b"fifo"), 0o622)
    os.mknod(path(b"null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(path(b"disk"), stat.S_IFBLK | 0o660, os.makedev(259, 70000))
    os.chown(path(b"disk"), 0, 6)
    os.setxattr(path(b"bin/wall"), "user.note", b"a\0b=c\nd")
    os.setxattr(path(b"shared"), "user.dir", b"")
    os.setxattr(path(b"private/big"), "security.capability", CAPABILITY)
    os.setxattr(path(b"fifo"), "trusted.fifo", b"f")
    os.setxattr(path(b"absolute"), "trusted.link", b"l", follow_symlinks=False)
    for at, (directory, names, files) in enumerate(os.walk(root, topdown=False)):
        for number, name in enumerate([*names, *files]):
            time = 1_500_000_000_000_000_000 + at * 10**12 + number * 1_000_000_007
            os.utime(os.path.join(directory, name), ns=(time, time), follow_symlinks=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("source")
    rich_tree(top)
    return top


def gnu_tar(source: Path, *options: str) -> bytes:
    return subprocess.run(
        ["tar", "-C", source, "--numeric-owner", *options, "-cf", "-", "--sort=name", "."],
        check=True,
        capture_output=True,
    ).stdout


def without_root(tree: dict[bytes, tuple[object, ...]]) -> dict[bytes, tuple[object, ...]]:
    return {name: what for name, what in tree.items() if name}


def seconds(tree: dict[bytes, tuple[object, ...]]) -> dict[bytes, tuple[object, ...]]:
    return {name: (*what[:5], {}, int(str(what[6])) // 10**9, what[7]) for name, what in tree.items()}


def test_pax_keeps_everything(place: Place, source: Path) -> None:
    layer = gnu_tar(source, "--format=posix", "--xattrs", "--xattrs-include=*")
    applied = put(layer, place.root, overlay=place.overlay)
    expected = without_root(look(source))
    assert without_root(look(place.root)) == expected
    assert (applied.entries, applied.size) == (len(expected) + 1, len(layer))


@pytest.mark.parametrize("how", [["--format=gnu"], ["--format=gnu", "--sparse"], ["--format=posix", "--sparse"]])
def test_other_formats(place: Place, source: Path, how: list[str]) -> None:
    put(gnu_tar(source, *how), place.root, overlay=place.overlay)
    assert seconds(without_root(look(place.root))) == seconds(without_root(look(source)))
    assert (place.root / "tmp" / "sparse").stat().st_blocks * 512 < (1 << 20 if "--sparse" in how else 3 << 20)


def test_the_oldest_formats(place: Place, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = tmp_path_factory.mktemp("old")
    (source / ("d" * 60) / ("e" * 60)).mkdir(parents=True)
    (source / ("d" * 60) / ("e" * 60) / "file").write_text("prefix")
    put(gnu_tar(source, "--format=ustar"), place.root, overlay=place.overlay)
    assert seconds(without_root(look(place.root))) == seconds(without_root(look(source)))
    short = tmp_path_factory.mktemp("v7")
    (short / "dir").mkdir()
    (short / "dir" / "file").write_text("seven")
    put(gnu_tar(short, "--format=v7"), place.root / ("d" * 60), overlay=place.overlay)
    assert (place.root / ("d" * 60) / "dir" / "file").read_text() == "seven"


def test_gnu_tar_makes_the_same_of_it(place: Place, source: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("tar")
    layer = gnu_tar(source, "--format=posix", "--xattrs", "--xattrs-include=*")
    subprocess.run(
        ["tar", "-C", other, "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", "-"], check=True, input=layer
    )
    put(layer, place.root, overlay=place.overlay)
    assert without_root(look(place.root)) == without_root(look(other))


def test_the_umask_has_no_say(place: Place, source: Path) -> None:
    layer = gnu_tar(source, "--format=posix", "--xattrs", "--xattrs-include=*")
    before = os.umask(0o777)
    try:
        put(layer, place.root, overlay=place.overlay)
        assert os.umask(0o777) == 0o777
    finally:
        os.umask(before)
    assert without_root(look(place.root)) == without_root(look(source))


def test_a_second_time_over_the_first(place: Place, source: Path) -> None:
    layer = gnu_tar(source, "--format=posix", "--xattrs", "--xattrs-include=*")
    put(layer, place.root, overlay=place.overlay)
    put(layer, place.root, overlay=place.overlay)
    assert without_root(look(place.root)) == without_root(look(source))


def test_groups_of_setgid_directories_are_not_inherited(place: Place) -> None:
    """The kernel gives what is made in a setgid directory its group, and directories the bit: the entry wins."""
    layer = archive(
        entry(b"d", DIR, mode=0o2777, gid=77), entry(b"d/f", FILE), entry(b"d/s", SYMLINK, link=b"f"),
        entry(b"d/sub", DIR), entry(b"d/sub/f", FILE), entry(b"d/h", LINK, link=b"d/f"), entry(b"d/p/f", gid=1),
        entry(b"d", DIR),
        entry(b"d/g"),
    )  # fmt: skip
    put(layer, place.root, overlay=place.overlay)
    groups = {name: (what[2], oct(int(str(what[0])) & 0o7000)) for name, what in look(place.root).items() if name}
    expected = dict.fromkeys([b"d", b"d/f", b"d/s", b"d/sub", b"d/sub/f", b"d/h", b"d/p", b"d/g"], (0, "0o0"))
    assert groups == expected | {b"d/p/f": (1, "0o0")}


def test_existing_directories_of_another_group(place: Place) -> None:
    (place.root / "old").mkdir()
    os.chown(place.root / "old", 0, 77)
    (place.root / "old").chmod(0o2777)
    put(archive(entry(b"old/f"), entry(b"old/d/f")), place.root, overlay=place.overlay)
    info = [os.stat(place.root / "old" / name) for name in ("f", "d", "d/f")]
    assert [(one.st_gid, one.st_mode & 0o7000) for one in info] == [(0, 0)] * 3


def test_xattrs_that_do_not_fit_are_no_errors(place: Place) -> None:
    xattrs = {b"SCHILY.xattr.user.a": b"1", b"SCHILY.xattr.nonsense.b": b"2"}
    layer = archive(
        entry(b"f", pax=xattrs), entry(b"s", SYMLINK, link=b"f", pax=xattrs), entry(b"p", b"6", pax=xattrs),
        entry(b"d", DIR, pax=xattrs), entry(b"c", b"3", major=1, minor=3, pax=xattrs),
    )  # fmt: skip
    put(layer, place.root, overlay=place.overlay)
    found = {name: what[5] for name, what in look(place.root).items() if name}
    assert found == {b"f": {"user.a": b"1"}, b"d": {"user.a": b"1"}, b"s": {}, b"p": {}, b"c": {}}


def test_overlays_own_xattrs_are_not_the_layers_to_set(place: Place) -> None:
    xattrs = {b"SCHILY.xattr.trusted.overlay.redirect": b"/etc", b"SCHILY.xattr.trusted.overlay.opaque": b"y"}
    put(archive(entry(b"d", DIR, pax=xattrs)), place.root, overlay=place.overlay)
    assert os.listxattr(place.root / "d") == []


def test_a_socket_in_the_tree_is_gnu_tars_to_skip_and_nobody_waits_for_a_fifo(place: Place) -> None:
    put(
        archive(entry(b"p", b"6"), entry(b"p", FILE, b"now a file"), entry(b"q", b"6")),
        place.root,
        overlay=place.overlay,
    )
    assert (place.root / "p").read_text() == "now a file"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(place.root / "sock"))
    put(archive(entry(b"sock", FILE, b"was a socket")), place.root, overlay=place.overlay)
    assert (place.root / "sock").read_text() == "was a socket"


def test_times_at_the_edge(place: Place) -> None:
    pairs = [
        (b"0", 0),
        (b"0.000000001", 1),
        (b"1.999999999", 1_999_999_999),
        (b"-1", 0),
        (b"4294967296.5", 4294967296500000000),
    ]
    layer = archive(*(entry(b"f%d" % at, pax={b"mtime": text}) for at, (text, _) in enumerate(pairs)))
    put(layer, place.root, overlay=place.overlay)
    assert [os.stat(place.root / f"f{at}").st_mtime_ns for at in range(len(pairs))] == [time for _, time in pairs]


def test_directories_keep_their_times_whatever_happens_in_them_later(place: Place) -> None:
    layer = archive(
        entry(b"d", DIR, mtime=5), entry(b"d/e", DIR, mtime=6), entry(b"d/e/f"), entry(b"d/g"), entry(b"d/.wh.g"),
        entry(b"d/s", SYMLINK, link=b"e"), entry(b"d/s/h"), entry(b"d/e/.wh..wh..opq"), entry(b"d/l", LINK,
        link=b"d/e/h"),
    )  # fmt: skip
    put(layer, place.root, overlay=place.overlay)
    assert [os.stat(place.root / name).st_mtime for name in ("d", "d/e")] == [5, 6]


def test_more_directories_than_are_kept_open(place: Place) -> None:
    """Evicted and entered again, out of order, with hard links from one end to the other."""
    names = [b"d%d/e%d" % (at % 40, at) for at in range(700)]
    members = [entry(name, DIR, mtime=at + 1) for at, name in enumerate(names)]
    members += [entry(name + b"/f", FILE, name) for name in reversed(names)]
    members += [entry(b"%b/l" % name, LINK, link=names[-at] + b"/f") for at, name in enumerate(names)]
    put(archive(*members), place.root, overlay=place.overlay)
    for at, name in enumerate(names):
        directory = place.root / os.fsdecode(name)
        assert (directory / "f").read_bytes() == name and (directory / "l").read_bytes() == names[-at]
        assert directory.stat().st_mtime == at + 1


def test_two_layers_at_once_in_one_process(tmp_path: Path, source: Path) -> None:
    """Threads share the umask, the working directory and the descriptor table; a layer uses none of them up."""
    from concurrent.futures import ThreadPoolExecutor

    layer = gnu_tar(source, "--format=posix", "--xattrs", "--xattrs-include=*")
    roots = [tmp_path / str(at) for at in range(4)]
    for root in roots:
        root.mkdir()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda root: apply([layer], TAR, Target(str(root), overlay=True)), roots))
    assert len({one.diff_id for one in found}) == 1
    for root in roots:
        assert without_root(look(root)) == without_root(look(source))
