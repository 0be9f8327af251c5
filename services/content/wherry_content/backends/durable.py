"""How much of an ingest a power cut leaves: a note beside its bytes, `<bytes> <boot id>`.

The page cache outlives a killed process, but not the machine. While the boot is the one of the note, all bytes that
are there count; after another boot only as many as the note says, since the rest is what the disk happened to keep.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from wherry_shared.boot import boot_id

NOTE = "durable"
_NOTE_MAX = 64


class Note:
    """The note of one ingest, by its directory's descriptor. Not for several threads at once."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self.count = 0

    def limit(self) -> int | None:
        """Take the note over, or make it; answers how many bytes count, None for all that are there."""
        try:
            fd = os.open(NOTE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._directory)
        except FileNotFoundError:
            self._write(durably=False)
            return 0
        self.count, same_boot = _parse(fd)
        if same_boot:
            return None
        self._write(durably=False)
        return self.count

    def set(self, count: int) -> None:
        """Note that so many bytes are durable; the note itself is when this returns."""
        if count != self.count:
            first, self.count = self.count == 0, count
            self._write(durably=True)
            if first:
                self._sync_names()

    def _sync_names(self) -> None:
        """The ingest's directory may be new itself."""
        parent = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            os.fsync(self._directory)
            os.fsync(parent)
        finally:
            os.close(parent)

    def distrust(self) -> None:
        """From the next opening on no byte counts but those that are noted: the disk has lost some."""
        with suppress(OSError):
            self._write(durably=True, boot="-")

    def _write(self, *, durably: bool, boot: str = "") -> None:
        fd = os.open(NOTE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._directory)
        try:
            os.pwrite(fd, f"{self.count:<19} {boot or boot_id()}\n".encode(), 0)
            if durably:
                os.fsync(fd)
        finally:
            os.close(fd)


class Directory:
    """An open directory. Threads that make their names in it durable at one time share an fsync."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._turn = threading.Lock()
        self._begun = self._done = 0  # fsyncs, counted
        self._failed = 0  # the last that failed
        self._error = OSError()

    def sync(self) -> None:
        """Back when the names are durable that the caller made before. OSError: they may not be."""
        mine = self._begun + 1  # the first that begins from here on sees them
        with self._turn:
            if self._done < mine:
                self._begun += 1
                try:
                    os.fsync(self.fd)
                except OSError as e:  # told once by the kernel, so kept for all who wait
                    self._failed, self._error = self._begun, e
                self._done = self._begun
            if self._failed >= mine:
                raise OSError(self._error.errno, self._error.strerror)

    def close(self) -> None:
        """Close it, when nobody uses it any more."""
        os.close(self.fd)


def noted(path: Path) -> int:
    """How many bytes of the ingest in the directory `path` are durable, by its note."""
    try:
        return _parse(os.open(path / NOTE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))[0]
    except FileNotFoundError:
        return 0


def _parse(fd: int) -> tuple[int, bool]:
    try:
        count, _, boot = os.read(fd, _NOTE_MAX).decode("ascii", "replace").partition(" ")
    finally:
        os.close(fd)
    return (int(count), boot.strip() == boot_id()) if count.isdecimal() else (0, False)
