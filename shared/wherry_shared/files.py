"""Files that survive: whole or not at all, and there after a power cut once the call has returned.

All of it is synchronous and costs an fsync or two: call it from a thread where the event loop must not wait.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    WherryError,
)

TEMPORARY = ".tmp-"
"""What the name of an unfinished file starts with; one that is left behind by a crash may be removed."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_SUCH_FILE = frozenset({errno.EISDIR, errno.ENAMETOOLONG})
_DAMAGED = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG})


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Make or replace the file `path`, durably; readers see the old bytes or the new ones.

    Raises what `os_errors` says, and then the old file is still there.
    """
    with atomic_file(path, mode=mode) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path, *, mode: int = 0o600) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends well, and is gone when it does not.

    The name is taken durably (fsync of the file, rename, fsync of the directory). `mode` is exact, whatever the
    umask. Raises what `os_errors` says.
    """
    if not path.name:
        raise InvalidArgument(f"{path}: is a directory")
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    with os_errors(str(path)):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                yield file
                file.flush()
                os.fchmod(fd, mode)
                os.fsync(fd)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(path.parent)


class OwnedFd:
    """A descriptor that is closed when the last who uses it lets go of it: no thread meets another file under it."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close it now, where no thread can be using it: an exception that is kept would keep it open, too."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: what was created, renamed or removed in it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path, *, mode: int = 0o700) -> None:
    """Make a directory and the missing ones above it, durably. One that is there is left as it is."""
    if path.is_dir():
        return
    make_directory(path.parent, mode=mode)
    with suppress(FileExistsError):
        os.mkdir(path, mode)
    sync_directory(path.parent)


@contextmanager
def os_errors(what: str) -> Iterator[None]:
    """Raise the system's refusals as errors of the house, in `what`'s name; errors of the house pass.

    ResourceExhausted: no space, inodes or quota left. DataLoss: the disk or the filesystem is damaged. NotFound,
    PermissionDenied: as they say. InvalidArgument: what was named is a directory, or too long a name.
    FailedPrecondition: the filesystem is read-only. Internal: anything else.
    """
    try:
        yield
    except OSError as e:
        raise translate(e, what) from e


def translate(e: OSError, what: str) -> WherryError:
    """The error of the house for one of the system."""
    reason = e.strerror or str(e)
    if e.errno in _FULL:
        return ResourceExhausted(f"{what}: {reason.lower()}")
    if e.errno in _DAMAGED:
        return DataLoss(f"{what}: {reason}")
    if isinstance(e, FileNotFoundError):
        return NotFound(f"{what}: not found")
    if isinstance(e, PermissionError):
        return PermissionDenied(f"{what}: {reason.lower()}")
    if e.errno in _NO_SUCH_FILE:
        return InvalidArgument(f"{what}: {reason.lower()}")
    if e.errno == errno.EROFS:
        return FailedPrecondition(f"{what}: {reason.lower()}")
    return Internal(f"{what}: {reason}")
