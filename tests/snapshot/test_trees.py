"""Trees that containers wrote are measured and removed without ever leaving them."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from snapshot_rig import needs_root, tree
from wherry_shared.errors import FailedPrecondition, Unavailable
from wherry_snapshot.backends import trees

pytestmark = needs_root


def never() -> None:
    return None


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A directory outside, that is as it was when the test is over."""
    outside = tmp_path / "canary"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep/file").write_text("x" * 100_000)
    before = tree(outside)
    yield outside
    assert tree(outside) == before


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    made = tmp_path / "victim"
    made.mkdir()
    return made


def remove(victim: Path) -> None:
    with trees.trusted_directory(victim.parent) as fd:
        trees.remove(fd, victim.name, never)


def test_links_lead_nowhere(victim: Path, canary: Path) -> None:
    (victim / "file").symlink_to(canary / "deep/file")
    (victim / "dir").symlink_to(canary)
    (victim / "up").symlink_to("..")
    (victim / "proc").symlink_to("/proc/self/cwd")
    (victim / "sub").mkdir()
    (victim / "sub/dir").symlink_to(canary)
    os.link(canary / "deep/file", victim / "hard")
    usage = trees.measure(victim, never)
    assert usage.inodes == 8
    assert usage.size < 200_000
    remove(victim)
    assert not victim.exists()


def test_a_victim_that_is_a_link_is_removed_itself(victim: Path, canary: Path) -> None:
    victim.rmdir()
    victim.symlink_to(canary)
    remove(victim)
    assert not victim.is_symlink()
    remove(victim)  # absent is no error


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + trees.HELD + 20, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, old)


def test_depth_has_no_bound(victim: Path, few_descriptors: None) -> None:
    depth = 1200
    fd = os.open(victim, os.O_RDONLY)
    for i in range(depth):
        for name in ("d" * 100, f"beside{i}"):
            os.mkdir(name, dir_fd=fd)
        below = os.open("d" * 100, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert trees.measure(victim, never).inodes == 2 * depth + 1
    remove(victim)
    assert not victim.exists()


def test_up_and_down_again_beyond_what_is_held_open(victim: Path) -> None:
    def grow(path: Path, depth: int) -> int:
        """Two branches at every tenth level, each as deep as what is left."""
        made = 0
        for i in range(depth):
            if i % 60 == 30:
                made += grow(_made(path / "branch"), depth - i) + 1
            path = _made(path / "d")
            made += 1
        return made

    def _made(path: Path) -> Path:
        path.mkdir()
        return path

    made = grow(victim, 200)
    assert trees.measure(victim, never).inodes == made + 1
    remove(victim)
    assert not victim.exists()


def test_every_kind_of_file_is_removed(victim: Path) -> None:
    os.mkfifo(victim / "fifo")
    os.mknod(victim / "zero", 0o600 | 0o020000, os.makedev(1, 5))
    os.mknod(victim / "disk", 0o600 | 0o060000, os.makedev(7, 200))
    os.mknod(victim / "socket", 0o600 | 0o140000)
    os.mkdir(os.fsencode(victim) + b"/\xff\n*")
    (victim / "closed").mkdir(mode=0)
    (victim / "closed/inside").write_text("")
    assert trees.measure(victim, never).inodes == 8
    remove(victim)
    assert not victim.exists()


def test_locked_files_are_unlocked(victim: Path, canary: Path) -> None:
    (victim / "dir/sub").mkdir(parents=True)
    for name in ("file", "dir/file", "dir/sub/log"):
        (victim / name).write_text("")
    (victim / "dir/link").symlink_to(canary / "deep/file")
    os.link(victim / "file", victim / "dir/other")
    for flags, name in (("+i", "dir/file"), ("+a", "dir/sub/log"), ("+i", "file"), ("+a", "dir/sub"), ("+i", "dir")):
        subprocess.run(["chattr", flags, str(victim / name)], check=True)
    remove(victim)
    assert not victim.exists()


@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_is_mounted_inside_stays(victim: Path, canary: Path, what: str) -> None:
    (victim / "a/b").mkdir(parents=True)
    (victim / "a/f").write_text("")
    target, source = (victim / "a/b", canary) if what == "directory" else (victim / "a/f", canary / "deep/file")
    subprocess.run(["mount", "--bind", str(source), str(target)], check=True)
    try:
        if what == "directory":
            assert trees.measure(victim, never).size < 100_000
        with pytest.raises(FailedPrecondition, match="mounted"):
            remove(victim)
        assert target.exists()
    finally:
        subprocess.run(["umount", str(target)], check=True)
    remove(victim)
    assert not victim.exists()


def test_a_mount_on_the_victim_itself_stays(victim: Path, canary: Path) -> None:
    subprocess.run(["mount", "--bind", str(canary), str(victim)], check=True)
    try:
        with pytest.raises(FailedPrecondition):
            remove(victim)
    finally:
        subprocess.run(["umount", str(victim)], check=True)


class Racer:
    """Does something over and over in a thread while the block runs."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = steps
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            for step in self._steps:
                with suppress(OSError):
                    step()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def test_a_directory_that_turns_into_a_link_leads_nowhere(victim: Path, canary: Path) -> None:
    link, spot, aside = victim.parent / "link", victim / "spot", victim.parent / "aside"
    link.symlink_to(canary)
    for _ in range(30):
        victim.mkdir(exist_ok=True)
        (spot / "inner").mkdir(parents=True, exist_ok=True)
        for i in range(20):
            (victim / f"d{i}").mkdir(exist_ok=True)
        race = Racer(
            lambda: os.rename(spot, aside), lambda: os.rename(link, spot),
            lambda: os.rename(spot, link), lambda: os.rename(aside, spot),
        )  # fmt: skip
        with race, suppress(FailedPrecondition):
            trees.measure(victim, never)
            remove(victim)
        for left in (aside, victim):
            with suppress(FileNotFoundError):
                remove(left)
        if not link.is_symlink():
            link.symlink_to(canary)


def test_what_is_moved_out_takes_nobody_along(victim: Path, canary: Path) -> None:
    """The way up from a directory that was moved elsewhere must not be taken."""
    deep = victim
    for _ in range(trees.HELD + 40):
        deep = deep / "d"
    deep.mkdir(parents=True)
    moved = victim / "d/d/d"
    level = threading.Event()

    class Moving(trees._Removal):
        seen = 0

        def visit(self, fd: int) -> list[str]:
            self.seen += 1
            if self.seen == trees.HELD + 20 and not level.is_set():
                level.set()
                os.rename(moved, canary / "moved")
            return super().visit(fd)

    try:
        with pytest.raises(trees.Aborted):
            trees.walk(os.open(victim, os.O_RDONLY), Moving(never), never)
        assert (canary / "deep/file").exists()
    finally:
        remove(canary / "moved")
    remove(victim)
    assert not victim.exists()


def test_what_is_still_written_to_goes_too(victim: Path) -> None:
    (victim / "busy").mkdir()
    counter = itertools.count()
    with Racer(lambda: (victim / f"busy/{next(counter)}").mkdir(), lambda: time.sleep(0.0005)):
        for _ in range(20):
            try:
                remove(victim)
                break
            except FailedPrecondition:
                continue  # it was faster; the next cleanup tries again
    remove(victim)
    assert not victim.exists()


def test_a_removal_can_be_stopped_and_taken_up_again(victim: Path) -> None:
    for i in range(50):
        (victim / f"d{i}").mkdir()
    calls = iter(range(1000))

    def check() -> None:
        if next(calls) == 20:
            raise Unavailable("stopping")

    with trees.trusted_directory(victim.parent) as fd, pytest.raises(Unavailable):
        trees.remove(fd, victim.name, check)
    assert victim.exists()
    remove(victim)
    assert not victim.exists()
