"""The FIFO into which a shim writes its log: read, or the shim would stop, and passed on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

log = logging.getLogger("wherry.task.shim")

NAME = "log"
_CHUNK = 1 << 16
_LINE_MAX = 4096


class Reader:
    """Holds both ends of the FIFO, so that neither side ever sees the other's absence."""

    def __init__(self, fd: int, container: str) -> None:
        self._fd = fd
        self._container = container
        self._rest = b""
        asyncio.get_running_loop().add_reader(fd, self._readable)

    @classmethod
    def make(cls, bundle: Path) -> Reader:
        """Of a bundle's FIFO, made if it is not there. Raises OSError."""
        path = bundle / NAME
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        return cls(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW), bundle.name)

    def _readable(self) -> None:
        try:
            *lines, rest = (self._rest + os.read(self._fd, _CHUNK)).split(b"\n")
        except BlockingIOError:
            return
        self._rest = rest[:_LINE_MAX]
        for line in lines:
            if line:
                level = logging.WARNING if b"level=warn" in line or b"level=error" in line else logging.DEBUG
                log.log(level, "shim of %s: %s", self._container, line[:_LINE_MAX].decode(errors="replace"))

    def close(self) -> None:
        """A second call does nothing."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
