"""The cache of open directories: after every entry each cached path still names the directory of its descriptor."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wherry_diff import tree as tree_module
from wherry_diff.extract import Extractor, Target
from wherry_diff.limits import DEFAULT
from wherry_diff.parents import Parents
from wherry_diff.tar import Reader, Stream
from wherry_diff.tree import Tree
from wherry_shared.errors import WherryError
from wherry_shared.openat2 import BENEATH, IN_ROOT, NO_MAGICLINKS, NO_SYMLINKS, openat2

from .layers import DIR, FILE, LINK, SYMLINK, archive, entry

SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
NAME = st.sampled_from([b"a", b"b", b"c"])
PATH = st.lists(NAME, min_size=1, max_size=4).map(b"/".join)
LINKED = st.one_of(PATH, PATH.map(lambda path: b"/" + path), PATH.map(lambda path: b"../" + path))
MEMBER = st.one_of(
    st.builds(entry, PATH, st.sampled_from([FILE, DIR, DIR])),
    st.builds(entry, PATH, st.just(SYMLINK), link=LINKED),
    st.builds(entry, PATH, st.just(LINK), link=LINKED),
    st.builds(
        lambda path, base: entry(path + b"/" + base), PATH, st.sampled_from([b".wh.a", b".wh.b", b".wh..wh..opq", b"f"])
    ),
)


def check(tree: Tree) -> None:
    """The kernel's own walk, without symbolic links, ends in the directory that the cache has for the path."""
    for path, fd in tree.opened.items():
        found = openat2(tree.root, path, os.O_PATH | os.O_DIRECTORY, NO_SYMLINKS | BENEATH)
        try:
            assert os.path.sameopenfile(found, fd), path
        finally:
            os.close(found)
    foreign = {fd for fd in tree.opened.values() if os.fstat(fd).st_gid != tree.group}
    assert tree.foreign == foreign
    for path in tree.times:
        os.close(openat2(tree.root, path, os.O_PATH | os.O_DIRECTORY, NO_SYMLINKS | BENEATH))


@pytest.mark.parametrize("overlay", [True, False])
@pytest.mark.parametrize("opened", [6, 256])
@settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
@given(members=st.lists(MEMBER, max_size=20))
def test_cached_paths_name_their_directories(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    overlay: bool,
    opened: int,
    members: list[bytes],
) -> None:
    monkeypatch.setattr(tree_module, "_MAX_OPENED", opened)
    root = tmp_path_factory.mktemp("root")
    parents = Parents(())
    tree = Tree(str(root), parents, DEFAULT, overlay=overlay, standalone=False)
    reader = Reader(Stream(iter([archive(*members)])), DEFAULT)
    extractor = Extractor(reader, tree, Target(str(root), overlay), DEFAULT)
    try:
        while (one := reader.next()) is not None:
            with suppress(WherryError, OSError):
                extractor.extract(one)
            check(tree)
            assert len(tree.opened) <= opened
        tree.apply_times()
        check(tree)
    finally:
        tree.close()


def test_the_two_directories_entered_last_stay_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tree_module, "_MAX_OPENED", 6)
    tree = Tree(str(tmp_path), Parents(()), DEFAULT, overlay=True, standalone=False)
    try:
        for at in range(40):
            tree.enter(b"old%d" % at)
        for at in range(60):
            first, second = tree.enter(b"d%d/e" % at), tree.enter(b"old%d" % (at % 40))
            assert tree.opened[first[0]] == first[1] and tree.opened[second[0]] == second[1]
            check(tree)
    finally:
        tree.close()


def test_openat2_stays_inside(tmp_path: Path) -> None:
    (tmp_path / "root" / "in").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "up").symlink_to("../outside")
    (tmp_path / "root" / "magic").symlink_to(f"/proc/{os.getpid()}/cwd")
    root = os.open(tmp_path / "root", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for path in (b"up", b"..", b"in/../..", b"/in"):
            with pytest.raises(OSError):
                openat2(root, path, os.O_RDONLY, NO_SYMLINKS | BENEATH)
        with pytest.raises(FileNotFoundError):
            openat2(root, b"up", os.O_RDONLY, IN_ROOT | NO_MAGICLINKS)
        with pytest.raises(OSError):
            openat2(root, b"magic", os.O_RDONLY, IN_ROOT | NO_MAGICLINKS)
        fd = openat2(root, b"/../in/../../in", os.O_RDONLY, IN_ROOT | NO_MAGICLINKS)
        assert os.path.sameopenfile(fd, fd) and os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "root" / "in")
        assert not os.get_inheritable(fd)
        os.close(fd)
    finally:
        os.close(root)
