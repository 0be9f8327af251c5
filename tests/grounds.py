"""Where snapshotters stand in tests that need a filesystem of their own: one on a loop device."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node import eventually

BTRFS_BYTES = 1 << 30
"""Only what is written is really taken; a btrfs below some 100 MiB is not to be had."""


@contextmanager
def btrfs_disk(path: Path, size: int = BTRFS_BYTES) -> Iterator[Path]:
    """A btrfs of its own, mounted at `path`; gone at the end. OSError: this host cannot have one."""
    image = path.with_suffix(".img")
    path.mkdir()
    try:
        with image.open("wb") as file:
            file.truncate(size)
        _must("mkfs.btrfs", "-q", str(image))
        _must("mount", "-o", "loop", str(image), str(path))
        try:
            yield path
        finally:
            # The last process that had it open may still be on its way out.
            eventually(lambda: subprocess.run(["umount", path]).returncode == 0, f"{path} stays busy")
    finally:
        shutil.rmtree(path, ignore_errors=True)
        image.unlink(missing_ok=True)


def _must(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as e:
        raise OSError(f"{command[0]} is not installed") from e
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
