"""What the options `uidmap=` and `gidmap=` ask of a mounter, done as it has to: the owners come out right."""

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

# In a mount namespace of its own: each lower directory is cloned, mapped and put somewhere, then the overlay is
# mounted on those. It prints the owners that it sees, and makes a file as the container's root.
MOUNTER = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def must(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
options, target = json.load(sys.stdin), sys.argv[1]
given = dict(o.partition("=")[::2] for o in options)
read, write = os.pipe()
child = os.fork()
if not child:
    must(libc.unshare(0x10000000)); os.write(write, b"1"); import signal; signal.pause()
os.read(read, 1)
for kind in ("uid", "gid"):
    open(f"/proc/{child}/{kind}_map", "w").write(given[kind + "map"].replace(":", " ").replace(",", chr(10)))
namespace = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
os.kill(child, 9); os.waitpid(child, 0)
must(libc.unshare(0x20000))
must(libc.mount(b"none", b"/", None, ctypes.c_ulong(1 << 18 | 1 << 14), None))
must(libc.mount(b"tmpfs", target.encode(), b"tmpfs", ctypes.c_ulong(0), None))
lower = []
for i, path in enumerate(given["lowerdir"].split(":")):
    tree = must(libc.syscall(ctypes.c_long(428), ctypes.c_int(-100), path.encode(), ctypes.c_uint(1)))
    attributes = (ctypes.c_uint64 * 4)(0x100000, 0, 0, namespace)
    flags, size = ctypes.c_uint(0x1000), ctypes.c_size_t(32)
    must(libc.syscall(ctypes.c_long(442), ctypes.c_int(tree), b"", flags, attributes, size))
    lower.append(f"{target}/{i}")
    os.mkdir(lower[-1])
    at, flags = lower[-1].encode(), ctypes.c_uint(4)
    must(libc.syscall(ctypes.c_long(429), ctypes.c_int(tree), b"", ctypes.c_int(-100), at, flags))
rest = [o for o in options if o.partition("=")[0] not in ("uidmap", "gidmap", "lowerdir")]
data = ",".join([*rest, "lowerdir=" + ":".join(lower)])
must(libc.mount(b"overlay", target.encode(), b"overlay", ctypes.c_ulong(0), data.encode()))
found = {n: [os.lstat(f"{target}/{n}").st_uid, os.lstat(f"{target}/{n}").st_gid] for n in [".", *os.listdir(target)]}
os.chmod(f"{target}/root-file", 0o600)
print(json.dumps(found))
"""


def test_the_parents_files_are_shown_under_other_owners(tmp_path: Path) -> None:
    backend = OverlayBackend(tmp_path / "overlay", {})
    if REMAP_IDS not in backend.capabilities:
        pytest.skip("this kernel or filesystem cannot map ids")
    for number, owner in ((1, 0), (2, 1000)):
        backend.create(Snapshot(number, "active", tuple(range(number - 1, 0, -1)), {}), lambda: None)
        path = Path(backend.tree(number), "root-file" if owner == 0 else "user-file")
        path.touch()
        os.chown(path, owner, owner)
    child = Snapshot(3, "active", (2, 1), MAPPED)
    backend.create(child, lambda: None)
    (mount,) = backend.mounts(child)
    (tmp_path / "mnt").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MOUNTER, str(tmp_path / "mnt")], input=json.dumps(mount.options),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    owners = {".": [100000, 200000], "root-file": [100000, 200000], "user-file": [101000, 201000]}
    assert json.loads(done.stdout) == owners
    copied = os.stat(Path(backend.tree(3), "root-file"))  # as the kernel copied it up: the host's ids, for good
    assert (copied.st_uid, copied.st_gid) == (100000, 200000)
    assert os.stat(Path(backend.tree(1), "root-file")).st_uid == 0
    backend.seal(child, False, lambda: None)
