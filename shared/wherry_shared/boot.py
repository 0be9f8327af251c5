"""What tells a restart of a process from one of the machine: a page cache outlives the first alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """The kernel's name for this boot (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
