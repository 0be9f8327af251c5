"""A blob that comes whole, as a file without any name until it has the blob's: what is cut off leaves nothing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from aiofiles.os import wrap
from wherry_shared.files import OwnedFd, os_errors

from .durable import Directory
from .local_ingest import same_file

_UNNAMED = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC


def can_be_named(directory: Directory) -> bool:
    """Whether the filesystem has files without a name that can get one later (open(2), O_TMPFILE)."""
    probe = f".probe-{secrets.token_hex(8)}"
    try:
        fd = os.open(".", _UNNAMED, 0o600, dir_fd=directory.fd)
        try:
            _link(fd, probe, directory)
            os.unlink(probe, dir_fd=directory.fd)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


class LocalWhole:
    """The bytes of one blob. discard: takes a file out of the way that has its name."""

    def __init__(
        self, what: str, data: bytes, target: tuple[Path, Directory], pool: Executor, discard: Callable[[Path], None]
    ) -> None:
        self._what = what
        self._data = data
        self._path, self._directory = target
        self._pool = pool
        self._discard = discard
        self._file = OwnedFd(-1)

    async def seal(self) -> None:
        """Those who come together share the fsyncs of the directory."""
        await wrap(self._seal)(executor=self._pool)

    def _seal(self) -> None:
        with os_errors(self._what):
            if self._make(replace=False):
                self._directory.sync()

    def settle(self, digest: str, size: int) -> None:
        """A name that no row stands for is removed by whoever finds it, so it is looked whether it is still there."""
        with os_errors(self._what):
            if not self._has_name():  # nor can this file get it again
                self._make(replace=True)
                self._directory.sync()

    def unsettle(self, digest: str) -> None:
        with os_errors(self._what):
            if self._has_name():
                os.unlink(self._path)

    async def close(self) -> None:
        self._file.close()

    def _has_name(self) -> bool:
        return self._file.fd >= 0 and same_file(self._path, self._file.fd)

    def _make(self, *, replace: bool) -> bool:
        """Make the file under the blob's name, durable but for that; False when it is taken: `settle` then decides."""
        self._file = OwnedFd(os.open(".", _UNNAMED, 0o600, dir_fd=self._directory.fd))
        fd, view = self._file.fd, memoryview(self._data)
        while view:
            view = view[os.write(fd, view) :]
        os.fchmod(fd, 0o444)
        while True:
            try:
                _link(fd, self._path.name, self._directory)
                break
            except FileExistsError:
                if not replace:
                    return False
                self._discard(self._path)
        os.fsync(fd)  # once it is linked, so that this is durable in the file, too
        return True


def _link(fd: int, name: str, directory: Directory) -> None:
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory.fd)  # by linkat(2), which follows that to the file
