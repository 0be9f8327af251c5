"""What the options `uidmap=` and `gidmap=` ask of a mounter, done by the monitor's: the owners come out right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from snapshot_rig import needs_root
from wherry_shared.api.snapshot import GID_LABEL, UID_LABEL
from wherry_snapshot.backends import REMAP_IDS, Snapshot
from wherry_snapshot.backends.overlay import OverlayBackend

pytestmark = needs_root

MAPPED = {UID_LABEL: "0:100000:65536", GID_LABEL: "0:200000:65536"}

# In a mount namespace of its own it prints the owners that it sees, and makes a file as the container's root.
MOUNTER = """
import json, os, sys
from wherry_task.monitor import libc, mounts
bundle, mount = sys.argv[1], json.load(sys.stdin)
libc.unshare_mounts()
libc.mount(None, "/", None, libc.MS_PRIVATE | libc.MS_REC)
before = len(open("/proc/self/mountinfo").readlines())
mounts.mount_rootfs([mount], f"{bundle}/rootfs")
assert len(open("/proc/self/mountinfo").readlines()) == before + 1, "something else stays mounted"
os.chdir(f"{bundle}/rootfs")
print(json.dumps({n: [os.lstat(n).st_uid, os.lstat(n).st_gid] for n in [".", *os.listdir(".")]}))
os.chmod("root-file", 0o600)
"""


def layers(backend: OverlayBackend, count: int) -> tuple[int, ...]:
    """So many committed layers, the nearest first; the lowest has root's file, the next a user's."""
    for number in range(1, count + 1):
        backend.create(Snapshot(number, "active", tuple(range(number - 1, 0, -1)), {}), lambda: None)
        if number < 3:
            path = Path(backend.tree(number), ("root-file", "user-file")[number - 1])
            path.touch()
            os.chown(path, (0, 1000)[number - 1], (0, 1000)[number - 1])
    return tuple(range(count, 0, -1))


@pytest.mark.parametrize("count", [2, 130])
def test_the_parents_files_are_shown_under_other_owners(tmp_path: Path, count: int) -> None:
    backend = OverlayBackend(tmp_path / "overlay", {})
    if REMAP_IDS not in backend.capabilities:
        pytest.skip("this kernel or filesystem cannot map ids")
    child = Snapshot(count + 1, "active", layers(backend, count), MAPPED)
    backend.create(child, lambda: None)
    (mount,) = backend.mounts(child)
    (tmp_path / "bundle").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MOUNTER, str(tmp_path / "bundle")], input=mount.model_dump_json(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    owners = {".": [100000, 200000], "root-file": [100000, 200000], "user-file": [101000, 201000]}
    assert json.loads(done.stdout) == owners
    copied = os.stat(Path(backend.tree(child.number), "root-file"))  # as the kernel copied it up: the host's ids
    assert (copied.st_uid, copied.st_gid) == (100000, 200000)
    assert os.stat(Path(backend.tree(1), "root-file")).st_uid == 0
    assert os.listdir(tmp_path / "bundle") == ["rootfs"]
