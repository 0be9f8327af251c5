"""Archives that try to get out of the root, or to break who extracts them.

`place` compares everything beside the root before and after, and looks for leaked descriptors and threads. Every case
is either refused with one of our errors or extracted *inside* the root: `inside` says what must then be there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wherry_diff.apply import apply
from wherry_diff.compress import compressor
from wherry_diff.extract import Target
from wherry_diff.limits import Limits
from wherry_shared.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, WherryError

from .conftest import Place
from .layers import (
    BLOCK,
    CHAR,
    DIR,
    FIFO,
    FILE,
    LINK,
    SYMLINK,
    TAR,
    archive,
    base256,
    entry,
    header,
    look,
    padded,
    pax,
    put,
)  # fmt: skip

SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def names(root: Path) -> list[bytes]:
    """What is in the tree; whiteouts of an overlay count as nothing."""
    return sorted(
        name for name, what in look(root).items() if name and not (stat.S_ISCHR(int(str(what[0]))) and what[3] == 0)
    )


INSIDE: dict[str, tuple[list[bytes], list[bytes]]] = {
    "dots": ([entry(b"../../evil"), entry(b"a/../../../canary/x")], [b"canary", b"canary/x", b"evil"]),
    "absolute": ([entry(b"/etc/passwd")], [b"etc", b"etc/passwd"]),
    "absolute twice": ([entry(b"//canary//x")], [b"canary", b"canary/x"]),
    "symlinked parent, relative": (
        [entry(b"s", SYMLINK, link=b"../canary"), entry(b"s/evil")], [b"canary", b"canary/evil", b"s"]),
    "symlinked parent, absolute": (
        [entry(b"s", SYMLINK, link=b"/"), entry(b"s/evil"), entry(b"s/s/s/more")], [b"evil", b"more", b"s"]),
    "chain of symlinks": (
        [entry(b"a", SYMLINK, link=b".."), entry(b"b", SYMLINK, link=b"a/.."), entry(b"c", SYMLINK, link=b"b/canary"),
         entry(b"c/etc/evil")],
        [b"a", b"b", b"c", b"canary", b"canary/etc", b"canary/etc/evil"]),
    "symlinked parent deep inside": (
        [entry(b"d", DIR), entry(b"d/up", SYMLINK, link=b"../../../canary/etc"), entry(b"d/up/passwd", FILE, b"evil")],
        [b"canary", b"canary/etc", b"canary/etc/passwd", b"d", b"d/up"]),
    "write through a symlink": (
        [entry(b"s", SYMLINK, link=b"../canary/secret"), entry(b"s", FILE, b"evil")], [b"s"]),
    "directory over a symlink": (
        [entry(b"s", SYMLINK, link=b"../canary"), entry(b"s", DIR, mode=0o777), entry(b"s/secret", FILE, b"evil")],
        [b"s", b"s/secret"]),
    "directory swapped for a symlink": (
        [entry(b"d", DIR), entry(b"d/e", DIR), entry(b"d/e/f"), entry(b"d", SYMLINK, link=b"../canary"),
        entry(b"d/e/g"),
         entry(b"d/secret", FILE, b"evil")],
        [b"canary", b"canary/e", b"canary/e/g", b"canary/secret", b"d"]),
    "directory swapped below an open one": (
        [entry(b"a/b/c/d/f"), entry(b"a/b", SYMLINK, link=b"/../../canary"), entry(b"a/b/c/d/g")],
        [b"a", b"a/b", b"canary", b"canary/c", b"canary/c/d", b"canary/c/d/g"]),
    "directory removed, symlink in its place": (
        [entry(b"d/e/f"), entry(b".wh.d"), entry(b"d", SYMLINK, link=b"../canary"), entry(b"d/e/g"),
        entry(b"d/secret")],
        [b"canary", b"canary/e", b"canary/e/g", b"canary/secret", b"d"]),
    "removed through a symlink, used by its name": (
        [entry(b"x/d/f"), entry(b"s", SYMLINK, link=b"x"), entry(b"s/.wh.d"), entry(b"x/d", SYMLINK, link=b"/canary"),
         entry(b"x/d/g"), entry(b"s/d/h")],
        [b"canary", b"canary/g", b"canary/h", b"s", b"x", b"x/d"]),
    "metadata through a symlink": (
        [entry(b"s", SYMLINK, link=b"../canary/secret", mode=0o777, uid=1, gid=1, mtime=1), entry(b"h", LINK,
        link=b"s", mode=0o777)],
        [b"h", b"s"]),
    "hard link to a symlink, then write through it": (
        [entry(b"s", SYMLINK, link=b"../canary/secret"), entry(b"h", LINK, link=b"s"), entry(b"h", FILE, b"evil")],
        [b"h", b"s"]),
    "hard link through a symlinked directory": (
        [entry(b"etc/passwd", FILE, b"mine"), entry(b"s", SYMLINK, link=b"/../etc"), entry(b"h", LINK,
        link=b"s/passwd"),
         entry(b"h", FILE, b"evil")],
        [b"etc", b"etc/passwd", b"h", b"s"]),
    "hard link by dots": (
        [entry(b"f"), entry(b"d", DIR), entry(b"h", LINK, link=b"../../f"), entry(b"i", LINK, link=b"d/../../f")],
        [b"d", b"f", b"h", b"i"]),
    "whiteout through a symlink": (
        [entry(b"s", SYMLINK, link=b"../canary"), entry(b"s/.wh.secret"), entry(b"s/.wh.etc")], [b"canary", b"s"]),
    "opaque through a symlink": (
        [entry(b"s", SYMLINK, link=b"../canary"), entry(b"s/.wh..wh..opq")], [b"canary", b"s"]),
    "opaque on the root": ([entry(b"a"), entry(b".wh..wh..opq"), entry(b"b")], [b"a", b"b"]),
    "other AUFS files": ([entry(b".wh..wh.plnk"), entry(b".wh..wh.aufs", DIR), entry(b"d/.wh..wh.orph", DIR)], [b"d"]),
    "the root as a symlink": (
        [entry(b".", SYMLINK, link=b"/canary"), entry(b"/", SYMLINK, link=b"../canary"), entry(b"./", LINK, link=b"x"),
         entry(b"", FILE, b"body"), entry(b"a/..", CHAR, major=1), entry(b"evil")],
        [b"evil"]),
    "the root as a directory": ([entry(b"./", DIR, mode=0o777, uid=5), entry(b"/", DIR, mode=0), entry(b"a")], [b"a"]),
    "the root as a symlink's target": (
        [entry(b"s", SYMLINK, link=b"."), entry(b"s/.", DIR, mode=0), entry(b"s/a"), entry(b"t", SYMLINK,
        link=b"/.."), entry(b"t/b")],
        [b"b", b"s", b"s/a", b"t"]),
    "duplicates": (
        [entry(b"a", FILE, b"1"), entry(b"a", FILE, b"2"), entry(b"a", SYMLINK, link=b"x"), entry(b"a", FIFO),
        entry(b"a", DIR),
         entry(b"a/b"), entry(b"a", CHAR, major=1, minor=3), entry(b"a", BLOCK, major=7), entry(b"a", FILE, b"last")],
        [b"a"]),
    "dangling symlink as a parent": (
        [entry(b"s", SYMLINK, link=b"/new/../newer/./est"), entry(b"s/f")], [b"newer", b"newer/est", b"newer/est/f",
        b"s"]),
    "symlink to itself, replaced": ([entry(b"s", SYMLINK, link=b"s"), entry(b"s", DIR), entry(b"s/f")], [b"s", b"s/f"]),
    "proc": (
        [entry(b"s", SYMLINK, link=b"/proc/self/root/tmp"), entry(b"s/f")],
        [b"proc", b"proc/self", b"proc/self/root", b"proc/self/root/tmp", b"proc/self/root/tmp/f", b"s"]),
    "a body for a device": ([entry(b"c", CHAR, size=4096, major=1, minor=3), entry(b"f")], [b"c", b"f"]),
}  # fmt: skip


@pytest.mark.parametrize("case", INSIDE)
def test_what_would_escape_stays_inside(place: Place, case: str) -> None:
    members, inside = INSIDE[case]
    put(archive(*members), place.root, overlay=place.overlay)
    assert names(place.root) == inside
    assert stat.S_IMODE(place.root.stat().st_mode) == 0o755 and place.root.stat().st_uid == 0


REFUSED: dict[str, list[bytes]] = {
    "whiteout of the parent": [entry(b"d/.wh...")],
    "whiteout of the root's parent": [entry(b".wh...")],
    "whiteout of the directory": [entry(b"d/.wh..")],
    "whiteout of nothing": [entry(b"d/.wh.")],
    "hard link to nothing": [entry(b"h", LINK, link=b"nothing")],
    "hard link out by dots": [entry(b"h", LINK, link=b"../canary/secret")],
    "hard link out by a symlink": [entry(b"s", SYMLINK, link=b"../canary"), entry(b"h", LINK, link=b"s/secret")],
    "hard link out absolutely": [entry(b"h", LINK, link=b"/etc/hostname")],
    "hard link to the root": [entry(b"h", LINK, link=b"/")],
    "hard link to dots": [entry(b"h", LINK, link=b"..")],
    "hard link to dots below": [entry(b"d", DIR), entry(b"h", LINK, link=b"d/..")],
    "hard link to a directory": [entry(b"d", DIR), entry(b"h", LINK, link=b"d")],
    "hard link to itself": [entry(b"h"), entry(b"h", LINK, link=b"h")],
    "hard link to what it replaces": [entry(b"d/f"), entry(b"d", LINK, link=b"d/f")],
    "hard link without a target": [entry(b"h", LINK)],
    "hard link to what is removed": [entry(b"f"), entry(b".wh.f"), entry(b"h", LINK, link=b"f")],
    "hard link into what is removed": [entry(b"d/f"), entry(b".wh.d"), entry(b"h", LINK, link=b"d/f")],
    "symlink without a target": [entry(b"s", SYMLINK)],
    "symlink too long": [entry(b"s", SYMLINK, link=b"x" * 5000)],
    "NUL in a symlink": [header(b"K", b"K", 4) + padded(b"a\0b\0"), entry(b"s", SYMLINK, link=b"x")],
    "NUL in a name": [header(b"L", b"L", 4) + padded(b"a\0b\0"), entry(b"s")],
    "a file as a parent": [entry(b"f"), entry(b"f/g")],
    "a device as a parent": [entry(b"c", CHAR, major=1, minor=3), entry(b"c/g")],
    "symlink to itself as a parent": [entry(b"s", SYMLINK, link=b"s"), entry(b"s/f")],
    "two symlinks to each other": [entry(b"s", SYMLINK, link=b"t"), entry(b"t", SYMLINK, link=b"s"), entry(b"s/f")],
    "symlink to a file as a parent": [entry(b"f"), entry(b"s", SYMLINK, link=b"f"), entry(b"s/g")],
    "huge uid": [entry(b"f", uid=base256(2**32, 8))],
    "uid that means no change": [entry(b"f", uid=base256(2**32 - 1, 8))],
    "negative gid": [entry(b"f", gid=base256(-1, 8))],
    "huge device": [entry(b"c", CHAR, major=base256(2**33, 8))],
    "negative size": [header(b"f", size=base256(-512, 12))],
    "size beyond the end": [header(b"f", size=1 << 30)],
    "wrong checksum": [entry(b"f", checksum=b"0000001\0")],
    "truncated": [header(b"f", size=5000) + bytes(100)],
    "unknown type": [entry(b"f", b"Z")],
    "PAX size that lies": [entry(b"f", FILE, b"x" * 512, pax={b"size": b"1000000"})],
    "PAX size into the next header": [entry(b"f", FILE, b"x" * 512, pax={b"size": b"0"}), entry(b"g")],
    "capability that is none": [entry(b"f", pax={b"SCHILY.xattr.security.capability": b"nonsense"})],
    "xattr without a name": [entry(b"f", pax={b"SCHILY.xattr.": b"x"})],
    "control characters in a name": [entry(b"\x1b[2J\r\n", b"Z")],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(place: Place, case: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        put(archive(*REFUSED[case]), place.root, overlay=place.overlay)
    assert caught.value.message.isprintable()


BOUNDED: dict[str, tuple[list[bytes], Limits]] = {
    "PAX header of 1 GiB": ([header(b"p", b"x", 1 << 30)], Limits()),
    "long name of 1 GiB": ([header(b"p", b"L", 1 << 30)], Limits()),
    "component too long": ([entry(b"n" * 256)], Limits()),
    "path too long": ([entry(b"d/" * 2100 + b"f")], Limits()),
    "path too long through a symlink": (
        [entry(b"d/" * 2000 + b"e", DIR), entry(b"s", SYMLINK, link=b"d/" * 2000), entry(b"s/" + b"d/" * 100 + b"f")],
        Limits()),
    "file too long through a symlink": (
        [entry(b"d/" * 2000 + b"e", DIR), entry(b"s", SYMLINK, link=b"d/" * 2000), entry(b"s/" + b"f" * 250)],
        Limits()),
    "too many entries": ([entry(b"f%d" % at) for at in range(11)], Limits(max_entries=10)),
    "whiteouts are entries": ([entry(b".wh.f%d" % at) for at in range(11)], Limits(max_entries=10)),
    "too many bytes": ([entry(b"f", FILE, bytes(100_000))], Limits(max_bytes=50_000)),
    "sparse file too large": (
        [entry(b"f", pax={b"GNU.sparse.map": b"", b"GNU.sparse.size": b"%d" % (1 << 50)})], Limits()),
}  # fmt: skip


@pytest.mark.parametrize("case", BOUNDED)
def test_what_is_bounded(place: Place, case: str) -> None:
    members, limits = BOUNDED[case]
    with pytest.raises(ResourceExhausted):
        put(archive(*members), place.root, overlay=place.overlay, limits=limits)


def test_symlinks_cost_a_bounded_number_of_steps(place: Place) -> None:
    """255 links of 2000 components each, for every single entry."""
    chain = [entry(b"s%d" % at, SYMLINK, link=b"./" * 2000 + b"s%d" % (at + 1)) for at in range(200)]
    members = [*chain, entry(b"s200", DIR), *(entry(b"s0/f%d" % at) for at in range(100))]
    with pytest.raises(ResourceExhausted, match="symbolic links"):
        put(archive(*members), place.root, overlay=place.overlay)


def test_the_deepest_tree_can_be_made_replaced_and_removed(place: Place) -> None:
    """2000 levels: deeper than the interpreter's recursion, and more than descriptors are kept open."""
    deep = b"/".join([b"d"] * 2000)
    put(archive(entry(deep + b"/f"), entry(deep, DIR, mtime=5), entry(b"d/x")), place.root, overlay=place.overlay)
    put(archive(entry(deep + b"/g"), entry(b"d/d", FILE, b"now a file")), place.root, overlay=place.overlay)
    assert names(place.root) == [b"d", b"d/d", b"d/x"]
    put(archive(entry(b".wh.d")), place.root, overlay=place.overlay)
    assert names(place.root) == []


def test_a_directory_that_is_moved_up_does_not_lead_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant can run a container on the snapshot that it has a layer applied to: what the container moves meanwhile
    had the way back end above the root, among the snapshots of others."""
    root = place.root / "snapshot"
    for directory in (root / "d" / "victim", root / "d" / "z" / "q", place.root / "z", place.root / "victim"):
        directory.mkdir(parents=True)
    (place.root / "victim" / "kept").write_text("somebody else's")
    listdir = os.listdir

    def moving(fd: int) -> list[str]:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("/d/z/q"):
            os.rename(root / "d" / "z" / "q", root / "q")
        return sorted(listdir(fd))

    with monkeypatch.context() as patch, pytest.raises(FailedPrecondition, match="'d/z/q' was moved"):
        patch.setattr(os, "listdir", moving)
        put(archive(entry(b".wh.d")), root, overlay=place.overlay)
    assert (place.root / "victim" / "kept").read_text() == "somebody else's"


def test_hard_links_over_symlinks_are_never_followed(place: Place) -> None:
    put(
        archive(
            entry(b"f", FILE, b"mine"), entry(b"s", SYMLINK, link=b"../canary/secret"),
            entry(b"s", LINK, link=b"f", mode=0o600), entry(b"t", SYMLINK, link=b"../canary/secret"), entry(b"u",
            LINK, link=b"t"),
        ),
        place.root, overlay=place.overlay,
    )  # fmt: skip
    assert (place.root / "s").read_text() == "mine" and (place.root / "u").is_symlink()


def test_a_standalone_layer_does_not_guess(place: Place) -> None:
    for members in (
        [entry(b"d/f")],
        [entry(b"h", LINK, link=b"f")],
        [entry(b"d/.wh.f")],
        [entry(b"s", SYMLINK, link=b"d"), entry(b"s/f")],
    ):
        with pytest.raises(FailedPrecondition, match="needs its parent"):
            put(archive(*members), place.root, overlay=place.overlay, standalone=True)


PARTS = [
    b"a",
    b"b",
    b"c",
    b"..",
    b".",
    b"",
    b".wh.a",
    b".wh.b",
    b".wh..wh..opq",
    b".wh..",
    b"canary",
    b"secret",
    b"fs",
    b"x",
]
PATHS = st.builds(
    lambda parts, start: start + b"/".join(parts), st.lists(st.sampled_from(PARTS), min_size=1, max_size=4),
    st.sampled_from([b"", b"", b"", b"/", b"../"]),
)  # fmt: skip
KINDS = st.sampled_from([FILE, FILE, DIR, DIR, SYMLINK, SYMLINK, LINK, FIFO, CHAR, BLOCK, b"g", b"\0"])
MEMBERS = st.builds(
    lambda name, kind, link, mode, data: entry(name, kind, data if kind in (FILE, b"\0") else b"", link=link,
    mode=mode),
    PATHS, KINDS, PATHS, st.sampled_from([0o644, 0o755, 0o6777, 0o0]), st.sampled_from([b"", b"data", b"x" * 600]),
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(layers=st.lists(st.lists(MEMBERS, max_size=12), min_size=1, max_size=2), parents=st.booleans())
def test_nothing_outside_changes_whatever_the_entries(
    place: Place, tmp_path_factory: pytest.TempPathFactory, layers: list[list[bytes]], parents: bool
) -> None:
    """`place` looks once at the end: every example gets a root of its own beside the same canary."""
    base = place.root / str(len(os.listdir(place.root)))
    base.mkdir()
    below = base / "below"
    below.mkdir()
    (below / "a").mkdir()
    (below / "a" / "b").write_text("lower")
    (base / "canary").mkdir()
    (base / "canary" / "secret").write_text("s3cret")
    (base / "fs").mkdir()
    before = {name: what for name, what in look(base).items() if name and not name.startswith(b"fs")}
    for members in layers:
        try:
            put(
                archive(*members), base / "fs", overlay=place.overlay,
                parents=(str(below),) if parents and place.overlay else (),
            )  # fmt: skip
        except WherryError as error:
            assert error.message.isprintable()
    assert {name: what for name, what in look(base).items() if name and not name.startswith(b"fs")} == before


def test_pax_headers_of_one_entry_do_not_reach_the_next_layer(place: Place) -> None:
    with pytest.raises(InvalidArgument):
        put(archive(entry(b"a"), pax({b"path": b"../canary/x"})), place.root, overlay=place.overlay)
    put(archive(entry(b"b")), place.root, overlay=place.overlay)
    assert names(place.root) == [b"a", b"b"]


def entries(count: int) -> Iterator[bytes]:
    """An archive of that many empty files, which never stands in memory as a whole."""
    for start in range(0, count, 1000):
        yield b"".join(header(b"f%07d" % at) for at in range(start, min(start + 1000, count)))
    yield bytes(1024)


def test_five_million_entries_end_at_the_bound(place: Place) -> None:
    """The bound is looked at for every entry, so a small one stands for the real one."""
    assert Limits().max_entries < 5_000_000
    with pytest.raises(ResourceExhausted, match="more than 3000 entries"):
        apply(entries(5_000_000), TAR, Target(str(place.root), place.overlay), Limits(max_entries=3000))
    assert len(os.listdir(place.root)) == 3000


@pytest.mark.parametrize("suffix", ["+gzip", "+zstd"])
def test_a_bomb_ends_in_the_middle_of_its_file(place: Place, suffix: str) -> None:
    """A file of 100 GB out of some MB: not more of it is written than the ratio allows."""

    def packed() -> Iterator[bytes]:
        form = compressor(TAR + suffix)
        yield form.compress(header(b"bomb", size=base256(100 << 30, 12)))
        zeros = bytes(4 << 20)
        for _ in range((100 << 30) // len(zeros)):
            yield form.compress(zeros)

    limits = Limits(max_ratio=100, ratio_after=8 << 20, max_bytes=1 << 40)
    with pytest.raises(ResourceExhausted, match="grows more than 100 times"):
        apply(packed(), TAR + suffix, Target(str(place.root), place.overlay), limits)
    assert (place.root / "bomb").stat().st_size < 1 << 30
