"""Memory that is given back is what it was."""

from __future__ import annotations

import ctypes
import mmap
import os

from wherry_shared.heap import give_back

PAGE = mmap.PAGESIZE


def there(start: int, pages: int) -> list[bool]:
    """Whether the process has each of them (proc_pid_pagemap(5))."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        words = memoryview(os.pread(fd, 8 * pages, start // PAGE * 8)).cast("Q")
        return [bool(word >> 63) for word in words]
    finally:
        os.close(fd)


def test_only_pages_of_zeros_go() -> None:
    with mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory[:] = bytes(8 * PAGE)
        memory[0:4] = memory[3 * PAGE - 1 : 3 * PAGE + 3] = memory[8 * PAGE - 4 :] = b"kept"
        before = bytes(memory)
        held = (ctypes.c_char * (8 * PAGE)).from_buffer(memory)
        start = ctypes.addressof(held)
        had = there(start, 8)
        give_back(start + 1, 8 * PAGE - 2)  # of the first and the last page only a part
        left = there(start, 8)
        del held
        assert had == [True] * 8
        assert left == [True, False, True, True, False, False, False, True]
        assert bytes(memory) == before
