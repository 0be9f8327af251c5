"""What this process takes of the machine, as the kernel tells it (proc(5))."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from functools import cache, lru_cache

MEMORY_SECONDS = 1.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. pss: its share, each page divided by those who have it too; 0 where the kernel does not tell."""

    virtual: int
    rss: int
    pss: int


def memory() -> Memory:
    """As it was at most MEMORY_SECONDS ago: the kernel looks at every page for it, which takes milliseconds."""
    return _memory(os.getpid(), time.monotonic() // MEMORY_SECONDS)


@lru_cache(maxsize=1)
def _memory(pid: int, _: float) -> Memory:  # by its pid: a forked process is another
    with open("/proc/self/statm") as file:
        virtual, resident = (int(word) * _PAGE for word in file.read().split()[:2])
    try:
        with open("/proc/self/smaps_rollup") as lines:
            pss = next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)
    except OSError:
        pss = 0
    return Memory(virtual, resident, pss)


def cpu_seconds() -> float:
    """User and system time so far."""
    return time.process_time()


def descriptors() -> tuple[int, int]:
    """How many are open, and how many may be."""
    return len(os.listdir("/proc/self/fd")) - 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def started_at() -> float:
    """When it was started, unix time."""
    return _started_at(os.getpid())


@cache
def _started_at(pid: int) -> float:  # by its pid: a forked process is another
    with open(f"/proc/{pid}/stat") as file:
        since_boot = int(file.read().rpartition(")")[2].split()[19]) / _TICKS
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
