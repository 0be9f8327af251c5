"""Who waits for something to happen in a directory: inotify, for all of the service."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger("wherry.task")

_MASK = 0x2 | 0x8 | 0x80 | 0x100  # modified, closed after writing, moved to, created
_HEAD = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class Watched:
    """One waiter on a directory."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def tell(self) -> None:
        """Something happened, or may have."""
        self._changed.set()

    async def change(self, patience: float) -> None:
        """Return when something has happened since the last call, or after `patience` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, patience)):
                await self._changed.wait()
        self._changed.clear()


class Watching:
    """Directories that are watched as long as somebody waits."""

    def __init__(self) -> None:
        self._fd = -1
        self._by_path: dict[Path, tuple[int, list[Watched]]] = {}
        self._by_number: dict[int, list[Watched]] = {}

    @contextmanager
    def on(self, directory: Path) -> Iterator[Watched]:
        """Whatever happens from here on is told. Without a watch to be had, it is looked again by the clock alone."""
        watched = Watched()
        number, waiters = self._by_path.get(directory) or (self._add(directory), [])
        self._by_path[directory] = number, waiters
        if number >= 0:
            self._by_number[number] = waiters
        waiters.append(watched)
        try:
            yield watched
        finally:
            waiters.remove(watched)
            if not waiters:
                self._remove(directory, number)

    def tell(self, directory: Path) -> None:
        """Wake whoever waits there."""
        for watched in self._by_path.get(directory, (0, []))[1]:
            watched.tell()

    def _add(self, directory: Path) -> int:
        if self._fd < 0:
            self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if self._fd >= 0:
                asyncio.get_running_loop().add_reader(self._fd, self._read)
        number = _libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK) if self._fd >= 0 else -1
        if number < 0:
            log.warning("%s is not watched: %s", directory, os.strerror(ctypes.get_errno()))
        return int(number)

    def _remove(self, directory: Path, number: int) -> None:
        self._by_path.pop(directory, None)
        if number >= 0 and self._by_number.pop(number, None) is not None:
            _libc.inotify_rm_watch(self._fd, number)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 64 << 10)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(data):
            number, _, _, length = _HEAD.unpack_from(data, offset)
            offset += _HEAD.size + length
            for watched in self._by_number.get(number, ()):
                watched.tell()

    def close(self) -> None:
        """Watch no more."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
