"""The memory of a blob's chunks: each is filled where it stays, and what it was in is kept for the next one.

And what a process has of its own without using it.
"""

from __future__ import annotations

import os
from functools import lru_cache
from io import BytesIO
from typing import Final

# mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, in bytes.
_MALLOC: Final = {-3: 4 << 20, -1: 32 << 20, -2: 4 << 20}

_DONTNEED: Final = 4  # madvise(2): MADV_DONTNEED


@lru_cache(maxsize=1)
def keep_heap() -> None:
    """Have it keep what chunks were in for the next ones, in this whole process and from now on.

    By default each chunk of 1 MiB is memory that the kernel hands out, clears and takes back: half of the time that
    receiving one takes. What was in flight at once stays with an idle process for that, up to 32 MiB.
    """
    import ctypes  # seldom needed

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's; musl has none
        for parameter, value in _MALLOC.items():
            libc.mallopt(parameter, value)


def give_back(address: int, size: int) -> None:
    """Have the kernel take back the pages of some memory that hold nothing but zeros: they are zeros again when
    somebody touches them. Nobody may write to it meanwhile, and it must be this process's own (no file, not shared)."""
    import ctypes

    page = os.sysconf("SC_PAGE_SIZE")
    libc, zeros, start = ctypes.CDLL(None), bytes(page), -(-address // page) * page
    for at in range(start, address + size - page + 1, page):
        if ctypes.string_at(at, page) == zeros:
            libc.madvise(ctypes.c_void_p(at), page, _DONTNEED)


def blank(size: int) -> BytesIO:
    """Room for `size` bytes that become a `bytes` without being copied.

    Fill its `getbuffer()`, let go of that, and take its `getvalue()`; while the buffer is held somewhere, that copies.
    """
    made = BytesIO()
    if size:
        made.seek(size - 1)
        made.write(b"\0")
    return made
