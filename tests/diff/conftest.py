"""A place to extract to, with something beside it that must stay as it is."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from descriptors import descriptors
from grounds import btrfs_disk

from .layers import look

_numbers = itertools.count()


@dataclass
class Place:
    root: Path
    canary: Path
    overlay: bool


@pytest.fixture(scope="session")
def btrfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A btrfs of its own."""
    with btrfs_disk(tmp_path_factory.mktemp("btrfs") / "at") as at:
        yield at


@pytest.fixture(params=["overlay", "native", "btrfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Fails the test if anything outside the root changes, or if a descriptor or a thread is left behind."""
    if request.param == "btrfs":
        disk: Path = request.getfixturevalue("btrfs")
        tmp_path = disk / f"place-{os.getpid()}-{next(_numbers)}"
        tmp_path.mkdir()
    root, canary = tmp_path / "fs", tmp_path / "canary"
    for directory in (root, canary, canary / "etc"):
        directory.mkdir()
    (canary / "etc" / "passwd").write_text("root:x:0:0\n")
    (canary / "secret").write_text("s3cret")
    (canary / "empty").mkdir()
    (tmp_path / "x").write_text("beside")
    before, opened = _outside(tmp_path), descriptors()
    yield Place(root, canary, request.param == "overlay")
    assert _outside(tmp_path) == before
    assert not descriptors() - opened
    subprocess.run(["rm", "-rf", root], check=True)  # deeper than pytest's own clean-up goes
    assert not [thread for thread in threading.enumerate() if thread.name == "wherry-decompress"]


def _outside(top: Path) -> dict[bytes, tuple[object, ...]]:
    return look(top / "canary") | {b"names": tuple(sorted(os.listdir(top))), b"x": tuple((top / "x").read_bytes())}
