"""One output of a process: a FIFO that it writes to, and a sparse file into which the kernel moves what it wrote.

A byte's place in the file is its place in the stream, and the file's size says how much was taken: `splice` takes
bytes out of the FIFO and lengthens the file in one system call. So a service killed at any moment has lost nothing,
repeats nothing and has nothing to write down. What nobody needs any more is cut out of the file as a hole.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from wherry_shared.errors import ResourceExhausted, Unimplemented

MOVE = 64 << 10
HOLE = 128 << 10
_PAGE = 4096
_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_NONBLOCK = 0x02  # SPLICE_F_NONBLOCK
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Spool:
    """Bytes `low` to `head` of a stream are here; `ended`: no more will come."""

    def __init__(self, fifo: Path, file: Path, *, opened: bool) -> None:
        """opened: the process may have opened and closed the FIFO before; else nothing is concluded from silence."""
        self.path = fifo
        self.opened = opened
        self.ended = False
        self._fifo = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            os.close(self._fifo)
            raise
        self.head = os.fstat(self._file).st_size
        self.low = self._first_kept()
        self._listening = False

    @staticmethod
    def make(fifo: Path) -> None:
        """Make the FIFO of a new stream. ResourceExhausted."""
        try:
            os.mkfifo(fifo, 0o600)
        except OSError as e:
            raise ResourceExhausted(f"{fifo}: {e.strerror}") from None

    @property
    def kept(self) -> int:
        """How many bytes of memory or disk it takes."""
        return self.head - self.low

    def move(self, most: int) -> int:
        """Take what is in the FIFO, up to `most` bytes; 0 when there is nothing now or will never be (`ended`).

        ResourceExhausted: no room for it.
        """
        if self.ended or most <= 0:
            return 0
        try:
            moved = os.splice(self._fifo, self._file, min(most, MOVE), offset_dst=self.head, flags=_NONBLOCK)
        except BlockingIOError:
            return 0
        except OSError as e:
            raise ResourceExhausted(f"{self.path}: {e.strerror}") from None
        self.head += moved
        if not moved and self.opened:
            self.ended = True
            self.listen(None)
        return moved

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from a place that is kept."""
        return os.pread(self._file, min(size, self.head - offset), offset)

    def forget(self, before: int) -> None:
        """Let go of what lies before a place: whole pages, and not for every little."""
        start, end = self.low // _PAGE * _PAGE, min(before, self.head) // _PAGE * _PAGE
        if end - start < HOLE:
            return
        if _libc.fallocate(self._file, _PUNCH, start, end - start):
            code = ctypes.get_errno()
            if code in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise Unimplemented(f"{self.path}: this filesystem cannot cut a hole into a file")
            raise ResourceExhausted(f"{self.path}: {os.strerror(code)}")
        self.low = end

    def listen(self, ready: Callable[[], None] | None) -> None:
        """Call `ready` whenever there is something to move; None: no more."""
        if self._fifo < 0 or bool(ready and not self.ended) == self._listening:
            return
        loop = asyncio.get_running_loop()
        if self._listening:
            loop.remove_reader(self._fifo)
        elif ready is not None:
            loop.add_reader(self._fifo, ready)
        self._listening = not self._listening

    def close(self) -> None:
        """Let go; what is in the files stays."""
        self.listen(None)
        if self._fifo >= 0:
            os.close(self._fifo)
            os.close(self._file)
            self._fifo = self._file = -1

    def _first_kept(self) -> int:
        try:
            return os.lseek(self._file, 0, os.SEEK_DATA)
        except OSError:  # ENXIO: there is nothing
            return self.head
