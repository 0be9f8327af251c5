"""A room for targets that write: a mount namespace where nothing but a fresh tmpfs, the tree of interest inside of it,
can be written to. What leads out of the tree meets a canary beside it, or the read-only rest of the system."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOM = Path("/media")
TREE = ROOM / "tree"
CANARY = ROOM / "outside"
SIZE = "256m"
INODES = 20_000


def enter(keep: Path) -> None:
    """Make this process's mount namespace, which is its own already (unshare(1)), the room. `keep` stays writable."""
    for command in (
        ["mount", "--bind", str(keep), str(keep)],
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE},nr_inodes={INODES},mode=0700", "room", str(ROOM)],
        ["mount", "-o", "remount,bind,ro", "/"],
    ):
        subprocess.run(command, check=True, capture_output=True)
    for path in ("/tmp", "/run", "/var/tmp", "/dev/shm"):
        if os.path.ismount(path):
            subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True, capture_output=True)
    furnish()


def furnish() -> None:
    CANARY.mkdir()
    (CANARY / "kept").write_bytes(b"as it was")
    (CANARY / "kept").chmod(0o640)
    (CANARY / "f").symlink_to("kept")
    (CANARY / "d").mkdir()
    os.utime(CANARY, (1, 1))


def state() -> list[tuple[object, ...]]:
    """All that is outside of the tree: names, attributes and bytes."""
    found: list[tuple[object, ...]] = []
    for path in sorted([CANARY, *CANARY.rglob("*")]):
        info = path.lstat()
        body = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        names = sorted(os.listxattr(path, follow_symlinks=False))
        found.append((str(path), info.st_mode, info.st_uid, info.st_gid, info.st_nlink, info.st_mtime_ns, body, *names))
    return [*found, tuple(sorted(os.listdir(ROOM)))]


def clear() -> None:
    """An empty tree."""
    shutil.rmtree(TREE, ignore_errors=True)
    TREE.mkdir()
