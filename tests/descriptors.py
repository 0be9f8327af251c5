"""The open descriptors of this process, for tests that look for leaks."""

from __future__ import annotations

import os
from contextlib import suppress


def descriptors() -> set[tuple[int, str]]:
    """The number of each, and what it leads to.

    Compare by `descriptors() - before`: what another test left to the garbage collector may close at any time.
    """
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the list itself
            found.add((int(number), os.readlink(f"/proc/self/fd/{number}")))
    return found
