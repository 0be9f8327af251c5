"""What a side's processes cost: a cgroup of its own per side, CPU seconds of all that ever ran in it, memory (PSS).

Containers are not in it: the runtime puts each into a cgroup elsewhere. The `client` group below a side's own holds
its drivers and command lines: they count for CPU and not for the node's memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path


class Cgroup:
    """A directory in the hierarchy that counts CPU time: cgroup v1's cpuacct, or v2 (its cpu.stat)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def top(cls, name: str) -> Cgroup:
        """A group directly below the mount. OSError where cgroups cannot be made (not root, read-only)."""
        for mount in (Path("/sys/fs/cgroup/cpuacct"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
            if (mount / "cpuacct.usage").exists() or (mount / "cgroup.controllers").exists():
                return cls(mount / name)
        raise OSError("neither cpuacct nor cgroup v2 is mounted below /sys/fs/cgroup")

    def child(self, name: str) -> Cgroup:
        return Cgroup(self.path / name)

    def join(self) -> None:
        """Put the calling process here; what it starts follows. Meant for `preexec_fn`."""
        fd = os.open(self.path / "cgroup.procs", os.O_WRONLY)
        os.write(fd, b"0")
        os.close(fd)

    @property
    def joining(self) -> Callable[[], None]:
        return self.join

    def cpu_seconds(self) -> float:
        """User and system time of everything that ran here or below, ended processes included."""
        usage = self.path / "cpuacct.usage"
        if usage.exists():
            return int(usage.read_text()) / 1e9
        for line in (self.path / "cpu.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "usage_usec":
                return int(value) / 1e6
        raise OSError(f"{self.path} does not tell its CPU time")

    def pids(self) -> list[int]:
        """The living processes here and below."""
        found: list[int] = []
        for directory, _, _ in os.walk(self.path):
            with contextlib.suppress(OSError):
                found += map(int, Path(directory, "cgroup.procs").read_text().split())
        return found

    def end(self, patience: float = 10.0) -> None:
        """Kill what is left here, and remove the group."""
        deadline = time.monotonic() + patience
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for directory, _, _ in os.walk(self.path, topdown=False):
            while time.monotonic() < deadline:
                try:
                    os.rmdir(directory)
                    break
                except OSError:  # the kernel is not done with its last process
                    time.sleep(0.02)


def remove_everywhere(name: str) -> None:
    """End a group of this name in every hierarchy: runtimes leave the parents of their containers' groups."""
    for path in (*Path("/sys/fs/cgroup").glob(f"*/{name}"), Path("/sys/fs/cgroup", name)):
        if path.is_dir():
            Cgroup(path).end()


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size: private pages, and each shared page divided by those who share it."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total
