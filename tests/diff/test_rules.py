"""Whiteouts, opaque directories, replacements, and what an overlay's layer takes over from its parents."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound, WherryError

from .conftest import Place
from .layers import CHAR, DIR, FIFO, FILE, LINK, SYMLINK, archive, entry, look, put

SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
OPAQUE = "trusted.overlay.opaque"


def is_whiteout(path: Path) -> bool:
    info = path.lstat()
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def is_opaque(path: Path) -> bool:
    return OPAQUE in os.listxattr(path) and os.getxattr(path, OPAQUE) == b"y"


def tree(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


# -- on the tree itself


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return tree(tmp_path / "plain", "d/a", "d/e/b", "d/e/c", "f", "g/x")


def files(root: Path) -> list[str]:
    return sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or not any(path.iterdir())
    )


def test_whiteouts_remove(plain: Path) -> None:
    put(
        archive(entry(b".wh.f"), entry(b"d/.wh.e"), entry(b".wh.nothing"), entry(b"g/.wh.nothing")),
        plain,
        overlay=False,
    )
    assert files(plain) == ["d/a", "g/x"]


def test_a_later_entry_wins_over_a_whiteout_and_the_other_way_round(plain: Path) -> None:
    layer = archive(
        entry(b".wh.f"), entry(b"f", FILE, b"new"), entry(b"n"), entry(b".wh.n"), entry(b".wh.d"), entry(b"d/z")
    )
    put(layer, plain, overlay=False)
    assert files(plain) == ["d/z", "f", "g/x"] and (plain / "f").read_text() == "new"


@pytest.mark.parametrize("late", [False, True])
def test_opaque_removes_only_what_the_layer_did_not_bring(plain: Path, late: bool) -> None:
    marker, rest = [entry(b"d/.wh..wh..opq")], [entry(b"d/new"), entry(b"d/e/deep/new"), entry(b"d/e", DIR)]
    put(archive(*(rest + marker if late else marker + rest)), plain, overlay=False)
    assert files(plain) == ["d/e/deep/new", "d/new", "f", "g/x"]


def test_late_opaque_markers_one_in_the_other(plain: Path) -> None:
    layer = archive(
        entry(b"d/e/b", FILE, b"mine"), entry(b"d/e/.wh..wh..opq"), entry(b"d/.wh..wh..opq"),
        entry(b"d/e/.wh..wh..opq"),
        entry(b"d/later"), entry(b".wh..wh..opq"), entry(b"d/.wh..wh..opq"),
    )  # fmt: skip
    put(layer, plain, overlay=False)
    assert files(plain) == ["d/e/b", "d/later"]


def test_opaque_after_what_was_brought_is_removed_again(plain: Path) -> None:
    layer = archive(entry(b"d/n/x"), entry(b"d/.wh.n"), entry(b"d/e/n"), entry(b"d/e", FIFO), entry(b"d/.wh..wh..opq"))
    put(layer, plain, overlay=False)
    assert files(plain) == ["d/e", "f", "g/x"]


def test_a_directory_made_anew_may_be_opaque_again(plain: Path) -> None:
    layer = archive(entry(b"d/.wh..wh..opq"), entry(b".wh.d"), entry(b"d/x"), entry(b"d/y"), entry(b"d/.wh..wh..opq"))
    put(layer, plain, overlay=False)
    assert files(plain) == ["d/x", "d/y", "f", "g/x"]


def test_files_and_directories_in_place_of_each_other(plain: Path) -> None:
    layer = archive(
        entry(b"d", FILE, b"file"), entry(b"f", DIR, mode=0o711), entry(b"f/in"), entry(b"g", SYMLINK, link=b"f"),
    )  # fmt: skip
    put(layer, plain, overlay=False)
    assert (plain / "d").read_text() == "file" and (plain / "f" / "in").exists() and os.readlink(plain / "g") == "f"
    assert stat.S_IMODE((plain / "f").stat().st_mode) == 0o711


def test_a_directory_over_a_directory_merges(plain: Path) -> None:
    os.setxattr(plain / "d", "user.old", b"1")
    put(
        archive(entry(b"d", DIR, mode=0o700, uid=5, mtime=9, pax={b"SCHILY.xattr.user.new": b"2"})),
        plain,
        overlay=False,
    )
    info = (plain / "d").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_mtime) == (0o700, 5, 9)
    assert sorted(os.listxattr(plain / "d")) == ["user.new", "user.old"]
    assert files(plain) == ["d/a", "d/e/b", "d/e/c", "f", "g/x"]


def test_a_file_is_replaced_not_overwritten(plain: Path) -> None:
    os.link(plain / "f", plain / "other")
    put(archive(entry(b"f", FILE, b"new")), plain, overlay=False)
    assert (plain / "other").read_text() == "f" and (plain / "f").read_text() == "new"


def test_hard_links_to_what_was_there_before(plain: Path) -> None:
    put(archive(entry(b"h", LINK, link=b"d/a", mode=0o600)), plain, overlay=False)
    assert (plain / "h").samefile(plain / "d" / "a")


# -- in an overlay


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    (tmp_path / "upper").mkdir()
    return tmp_path / "upper"


def test_whiteouts_become_devices_and_markers_become_xattrs(upper: Path) -> None:
    put(archive(entry(b".wh.f", uid=3, gid=4), entry(b"d", DIR), entry(b"d/.wh..wh..opq"), entry(b"d/n")), upper)
    assert is_whiteout(upper / "f") and is_opaque(upper / "d")
    assert sorted(os.listdir(upper)) == ["d", "f"] and os.listdir(upper / "d") == ["n"]
    assert ((upper / "f").lstat().st_uid, (upper / "f").lstat().st_gid) == (3, 4)


def test_a_whiteout_takes_what_the_layer_brought_before_it(upper: Path) -> None:
    put(archive(entry(b"f"), entry(b".wh.f"), entry(b"d/x"), entry(b".wh.d"), entry(b".wh.d")), upper)
    assert is_whiteout(upper / "f") and is_whiteout(upper / "d")


def test_a_directory_where_something_was_removed_hides_the_parents(upper: Path) -> None:
    layer = archive(
        entry(b".wh.d"), entry(b"d", DIR), entry(b".wh.i"), entry(b"i/f"), entry(b"t"), entry(b"t", DIR),
        entry(b"plain", DIR),
        entry(b"plain", DIR),
    )  # fmt: skip
    put(layer, upper)
    assert [is_opaque(upper / name) for name in ("d", "i", "t", "plain")] == [True, True, True, False]


def test_implied_directories_look_as_in_the_nearest_parent_that_has_them(tmp_path: Path, upper: Path) -> None:
    near, far = tree(tmp_path / "near", "a/x"), tree(tmp_path / "far", "a/x", "a/b/x", "c/x")
    (near / "a").chmod(0o2711)
    os.chown(near / "a", 5, 6)
    os.chown(far / "a" / "b", 7, 8)
    (far / "a" / "b").chmod(0o700)
    (far / "a").chmod(0o777)
    os.setxattr(far / "a" / "b", "user.note", b"kept")
    os.setxattr(far / "a" / "b", "trusted.overlay.origin", b"dropped")
    os.utime(far / "a" / "b", ns=(1, 123_456_789))
    put(archive(entry(b"a/b/c/f"), entry(b"a/b/g")), upper, parents=(str(near), str(far)))
    info = [os.stat(upper / name) for name in ("a", "a/b", "a/b/c", "a/b/c/f", "a/b/g")]
    assert [(oct(stat.S_IMODE(one.st_mode)), one.st_uid, one.st_gid) for one in info] == [
        ("0o2711", 5, 6), ("0o700", 7, 8), ("0o755", 0, 0), ("0o644", 0, 0), ("0o644", 0, 0),
    ]  # fmt: skip
    assert os.listxattr(upper / "a" / "b") == ["user.note"] and info[1].st_mtime_ns == 123_456_789


@pytest.mark.parametrize("how", ["whiteout", "whiteout above", "opaque", "file", "own opaque", "own whiteout"])
def test_what_a_nearer_parent_hides_is_not_copied(tmp_path: Path, upper: Path, how: str) -> None:
    far, near = tree(tmp_path / "far", "a/b/x"), tmp_path / "near"
    (far / "a").chmod(0o700)
    (far / "a" / "b").chmod(0o700)
    near.mkdir()
    members = [entry(b"a/b/f")]
    if how == "whiteout":
        (near / "a").mkdir(0o755)
        os.mknod(near / "a" / "b", stat.S_IFCHR, 0)
    elif how == "whiteout above":
        os.mknod(near / "a", stat.S_IFCHR, 0)
    elif how == "opaque":
        (near / "a").mkdir(0o755)
        os.setxattr(near / "a", OPAQUE, b"y")
    elif how == "file":
        tree(near, "a")
    elif how == "own opaque":
        members = [entry(b"a", DIR), entry(b"a/.wh..wh..opq"), *members]
    else:
        members = [entry(b".wh.a"), *members]
    put(archive(*members), upper, parents=(str(near), str(far)))
    assert stat.S_IMODE((upper / "a" / "b").stat().st_mode) == 0o755


def test_parents_symlinks_stay_inside_the_parent(tmp_path: Path, upper: Path) -> None:
    (tmp_path / "outside").mkdir(mode=0o700)
    below = tree(tmp_path / "below", "real/x")
    (below / "real").chmod(0o711)
    (below / "out").symlink_to("../outside")
    (below / "inside").symlink_to("/real")
    put(archive(entry(b"out/f"), entry(b"inside/f")), upper, parents=(str(below),))
    modes = [stat.S_IMODE((upper / name).stat().st_mode) for name in ("out", "inside")]
    assert modes == [0o755, 0o711]


def test_hard_link_targets_are_copied_up(tmp_path: Path, upper: Path) -> None:
    below = tree(tmp_path / "below", "d/target")
    (below / "d").chmod(0o711)
    os.chown(below / "d" / "target", 5, 6)
    (below / "d" / "target").chmod(0o4755)
    os.setxattr(below / "d" / "target", "user.note", b"x")
    os.utime(below / "d" / "target", ns=(5, 6))
    (below / "link").symlink_to("nowhere")
    os.mkfifo(below / "fifo")
    layer = archive(
        entry(b"h", LINK, link=b"d/target", mode=0o4755, uid=5, gid=6, mtime=7), entry(b"s", LINK, link=b"link"),
        entry(b"p", LINK, link=b"fifo", mode=0o600), entry(b"i", LINK, link=b"d/target", mode=0o4755, uid=5, gid=6,
        mtime=7),
    )  # fmt: skip
    put(layer, upper, parents=(str(below),))
    found = look(upper)
    assert found[b"h"][:6] == look(below)[b"d/target"][:6] and (upper / "h").samefile(upper / "d" / "target")
    assert (upper / "i").samefile(upper / "h") and (upper / "h").read_text() == "d/target"
    assert found[b"s"][4] == b"nowhere" and stat.S_ISFIFO((upper / "p").stat().st_mode)
    assert stat.S_IMODE((upper / "d").stat().st_mode) == 0o711
    assert (below / "d" / "target").stat().st_nlink == 1


@pytest.mark.parametrize(
    "members",
    [
        [entry(b".wh.f"), entry(b"h", LINK, link=b"f")], [entry(b".wh.d"), entry(b"h", LINK, link=b"d/a")],
        [entry(b"d", DIR), entry(b"d/.wh..wh..opq"), entry(b"h", LINK, link=b"d/a")], [entry(b"h", LINK, link=b"d")],
        [entry(b"h", LINK, link=b"gone")], [entry(b"h", LINK, link=b"out/secret")], [entry(b"h", LINK, link=b"d/none")],
    ],
)  # fmt: skip
def test_hard_links_to_what_is_not_to_be_had(tmp_path: Path, upper: Path, members: list[bytes]) -> None:
    below = tree(tmp_path / "below", "f", "d/a")
    tree(tmp_path / "outside", "secret")
    (below / "out").symlink_to("../outside")
    os.mknod(below / "gone", stat.S_IFCHR, 0)
    with pytest.raises(InvalidArgument):
        put(archive(*members), upper, parents=(str(below),))


def test_standalone_layers(upper: Path) -> None:
    whole = archive(
        entry(b"d", DIR), entry(b"d/f"), entry(b"d/.wh.x"), entry(b"d/.wh..wh..opq"), entry(b".wh.top"), entry(b"h",
        LINK, link=b"d/f"),
        entry(b"s", SYMLINK, link=b"d"), entry(b"s/g"), entry(b".wh.e"), entry(b"top", FILE),
    )  # fmt: skip
    assert put(whole, upper, standalone=True).entries == 10
    with pytest.raises(FailedPrecondition, match="needs its parent"):
        put(archive(entry(b".wh..wh..opq")), upper, standalone=True)


def test_a_root_or_a_parent_that_is_not_there(tmp_path: Path, upper: Path) -> None:
    with pytest.raises(NotFound):
        put(archive(), tmp_path / "none")
    tree(tmp_path, "file")
    with pytest.raises(NotFound):
        put(archive(), tmp_path / "file")
    with pytest.raises(NotFound):
        put(archive(), upper, parents=(str(upper), str(tmp_path / "none")))


# -- both: what an overlay shows is what the tree itself would be


def lower_tree(root: Path) -> Path:
    tree(root, "a/b", "a/c/a", "b", "c/a/b", "c/c")
    (root / "a").chmod(0o750)
    os.chown(root / "a" / "c", 3, 4)
    os.link(root / "b", root / "c" / "b")
    return root


NAME = st.sampled_from([b"a", b"b", b"c"])
PATH = st.lists(NAME, min_size=1, max_size=3).map(b"/".join)
WHITEOUT = st.builds(lambda path, base: b"/".join([*path, base]), st.lists(NAME, max_size=2),
                     st.sampled_from([b".wh.a", b".wh.b", b".wh..wh..opq"]))  # fmt: skip
MEMBER = st.one_of(
    st.builds(entry, PATH, st.just(FILE), st.sampled_from([b"", b"new"]), mode=st.sampled_from([0o644, 0o4711])),
    st.builds(entry, PATH, st.just(DIR), mode=st.sampled_from([0o755, 0o2770])),
    st.builds(entry, PATH, st.sampled_from([SYMLINK, LINK]), link=PATH),
    st.builds(entry, WHITEOUT),
    st.builds(entry, WHITEOUT),
)


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
@example([entry(b"a", LINK, link=b"b"), entry(b".wh..wh..opq")])
@example([entry(b"b", LINK, link=b"c/a/b"), entry(b".wh..wh..opq")])
@example([entry(b"b", LINK, link=b"c/a/b"), entry(b"c/a/b", FILE, b"own"), entry(b".wh..wh..opq")])
@given(st.lists(MEMBER, min_size=1, max_size=8))
def test_an_overlay_shows_what_the_tree_itself_would_be(
    tmp_path_factory: pytest.TempPathFactory, members: list[bytes]
) -> None:
    base = tmp_path_factory.mktemp("parity")
    lower = lower_tree(base / "lower")
    subprocess.run(["cp", "-a", lower, base / "plain"], check=True)
    (base / "upper").mkdir()
    try:
        put(archive(*members), base / "plain", overlay=False)
    except WherryError:
        return  # a parent that is a file below is refused there and not seen in an overlay
    put(archive(*members), base / "upper", parents=(str(lower),))
    with mounted(base, base / "upper", lower) as merged:
        shown = look(merged, times=False)
    expected = look(base / "plain", times=False)
    shown.pop(b""), expected.pop(b"")
    assert {name: what[:5] for name, what in shown.items()} == {name: what[:5] for name, what in expected.items()}


class mounted:  # noqa: N801 - used as a function
    """An overlay of the layers, the uppermost first, read-only."""

    def __init__(self, base: Path, *layers: Path) -> None:
        self._at = base / "merged"
        self._layers = ":".join(map(str, layers))

    def __enter__(self) -> Path:
        self._at.mkdir()
        subprocess.run(["mount", "-t", "overlay", "-o", f"ro,lowerdir={self._layers}", "none", self._at], check=True)
        return self._at

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", self._at], check=True)


def test_a_whiteout_where_the_parents_have_a_symbolic_link_leaves_no_name_behind(tmp_path: Path, upper: Path) -> None:
    lower = tmp_path / "lower"
    tree(lower, "real/x", "real/y")
    (lower / "link").symlink_to("real")
    put(archive(entry(b"link/.wh.x"), entry(b"real/.wh.x")), upper, parents=(str(lower),))
    with mounted(tmp_path, upper, lower) as merged:
        assert os.listdir(merged / "link") == [] and os.listdir(merged / "real") == ["y"]


def test_an_opaque_root_hides_the_parents(tmp_path: Path, upper: Path) -> None:
    near, far = tree(tmp_path / "near", "n/x", "both/near"), tree(tmp_path / "far", "f/x", "both/far", "gone")
    os.mknod(near / "gone", stat.S_IFCHR, 0)
    layer = archive(
        entry(b"both/mine"), entry(b".wh..wh..opq"), entry(b"f/mine"), entry(b"n", DIR), entry(b".wh..wh..opq")
    )
    put(layer, upper, parents=(str(near), str(far)))
    with mounted(tmp_path, upper, near, far) as merged:
        assert files(merged) == ["both/mine", "f/mine", "n"]


def test_a_device_0_0_is_no_file_of_an_overlay(place: Place) -> None:
    put(archive(entry(b"c", CHAR)), place.root, overlay=place.overlay)
    assert is_whiteout(place.root / "c")
