"""Content as files: `blobs/<algorithm>/<hex>`, `ingest/<key>/data`, `trash/` for what is being freed, `rotten/`."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import aiofiles.os
from aiofiles.os import wrap
from wherry_shared.api.content import Located
from wherry_shared.errors import DataLoss
from wherry_shared.files import OwnedFd, make_directory, os_errors
from wherry_shared.heap import blank

from . import Backend, Progress, Whole
from .durable import Directory, noted
from .local_ingest import DATA, LocalIngest, same_file
from .local_whole import LocalWhole, can_be_named
from .whole import WholeIngest

T = TypeVar("T")

THREADS = 16  # a few may sit in fsync while the others read
OPEN_BLOBS = 64
FREED = 100  # names removed in one hop to a thread
INLINE_BYTES = 1 << 20  # up to here a copy out of the page cache is cheaper than the hop to a thread
BLOCK = 1 << 20
_HEX = {"sha256": re.compile(r"[a-f0-9]{64}\Z"), "sha512": re.compile(r"[a-f0-9]{128}\Z")}


class LocalBackend:
    """Blobs and ingests below one directory; several processes may have it open."""

    replicable = True

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._ingests = root / "ingest"
        self._trash = root / "trash"
        self._rotten = root / "rotten"
        self._pool = ThreadPoolExecutor(THREADS, "content")
        self._directories: dict[str, Directory] = {}
        self._open: OrderedDict[str, Blob] = OrderedDict()
        self._named_later = False

    async def start(self) -> None:
        with os_errors(str(self._blobs.parent)):
            for path in (self._ingests, self._trash, self._rotten, *(self._blobs / name for name in _HEX)):
                make_directory(path)
            for name in _HEX:
                self._directories[name] = Directory(self._blobs / name)
        self._named_later = all(can_be_named(directory) for directory in self._directories.values())

    async def close(self) -> None:
        await asyncio.to_thread(self._pool.shutdown)
        self._open.clear()
        for directory in self._directories.values():
            directory.close()
        self._directories.clear()

    # ---- ingests

    async def open(self, key: str, what: str) -> LocalIngest:
        held = await self._in_thread(LocalIngest.acquire, what, self._ingests / key, self._pool, self._target)
        held.follow()
        return held

    def whole(self, data: bytes, digest: str, what: str) -> Whole:
        if self._named_later:
            return LocalWhole(what, data, self._target(digest), self._pool, self._discard)
        return WholeIngest(self, data, what)

    async def progress(self, key: str) -> Progress | None:
        try:
            state = os.stat(self._ingests / key / DATA)
        except FileNotFoundError:
            return None
        durable = min(noted(self._ingests / key), state.st_size)
        return Progress(state.st_size, datetime.fromtimestamp(state.st_mtime, UTC), durable)

    async def touch(self, key: str) -> None:
        with suppress(FileNotFoundError):
            os.utime(self._ingests / key)

    def detach(self, key: str) -> None:
        self._discard(self._ingests / key)

    async def sweep(self, known: Callable[[str], bool]) -> int:
        count = 0
        for entry in os.scandir(self._ingests):
            if known(entry.name):
                continue
            try:
                fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue  # its writer has ended
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not known(entry.name) and same_file(Path(entry.path), fd):
                    self._discard(Path(entry.path))
                    count += 1
            except BlockingIOError:
                continue  # another replica's, on the way to its row
            finally:
                os.close(fd)
        return count

    async def purge(self) -> None:
        names = await aiofiles.os.listdir(self._trash, executor=self._pool)
        for first in range(0, len(names), FREED):
            await self._in_thread(_free, self._trash, names[first : first + FREED])

    def _discard(self, path: Path) -> None:
        with os_errors(str(path)), suppress(FileNotFoundError):
            os.rename(path, self._trash / secrets.token_hex(8))

    # ---- blobs

    def _target(self, digest: str) -> tuple[Path, Directory]:
        """A blob's path, and the directory that it is in."""
        algorithm, _, encoded = digest.partition(":")
        return self._blobs / algorithm / encoded, self._directories[algorithm]

    def _path(self, digest: str) -> Path:
        return self._target(digest)[0]

    def has(self, digest: str, size: int) -> bool:
        return self._size(digest) == size

    async def size(self, digest: str) -> int | None:
        return self._size(digest)

    def _size(self, digest: str) -> int | None:
        try:
            return os.stat(self._path(digest)).st_size
        except FileNotFoundError:
            return None

    async def read(self, digest: str, offset: int, size: int) -> bytes:
        # Not aiofiles: its file objects share one position, and readers keep several reads of a blob in flight.
        with os_errors(f"blob {digest}"):
            blob = self._blob(digest)
            if size <= INLINE_BYTES and (data := blob.cached(offset, size)) is not None:
                return data
            return await self._in_thread(blob.read, offset, size)

    def _blob(self, digest: str) -> Blob:
        """The open file of a blob: the one that has its name now, whatever another replica did."""
        try:
            path = self._path(digest)
            now = os.stat(path)
            blob = self._open.pop(digest, None)
            if blob is None or blob.identity != (now.st_dev, now.st_ino):
                blob = Blob(path)
        except FileNotFoundError:
            raise DataLoss(f"blob {digest} has a record and no bytes: upload it again") from None
        while len(self._open) >= OPEN_BLOBS:
            self._open.popitem(last=False)
        self._open[digest] = blob
        return blob

    async def locate(self, digest: str) -> Located | None:
        path = self._path(digest)
        try:
            state = os.stat(path)
        except FileNotFoundError:
            return None
        return Located(path=str(path), size=state.st_size, device=state.st_dev, inode=state.st_ino)

    async def compute(self, digest: str, *, fresh: bool = False) -> tuple[str, object]:
        with os_errors(f"blob {digest}"):
            return await self._in_thread(_compute, self._blob(digest), digest.partition(":")[0], fresh)

    def blobs(self) -> list[str]:
        return [
            f"{algorithm}:{entry.name}"
            for algorithm, pattern in _HEX.items()
            for entry in os.scandir(self._blobs / algorithm)
            if pattern.match(entry.name)
        ]

    def remove(self, digest: str) -> None:
        self._discard(self._path(digest))

    def quarantine(self, digest: str, identity: object) -> str:
        path = self._path(digest)
        with os_errors(f"blob {digest}"), suppress(FileNotFoundError):
            state = os.stat(path)
            if (state.st_dev, state.st_ino) == identity:
                aside = self._rotten / f"{digest.replace(':', '-')}-{secrets.token_hex(4)}"
                os.rename(path, aside)
                return str(aside)
        return ""

    async def tidy(self) -> None:
        """Close what has no name any more, so that its bytes are freed; free what a crash left in the trash."""
        for digest, blob in list(self._open.items()):
            if not os.fstat(blob.fd).st_nlink:
                del self._open[digest]
        await self.purge()

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await wrap(function)(*args, executor=self._pool)


class Blob(OwnedFd):
    """An open blob, shared by those who read it."""

    __slots__ = ("identity",)

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
        state = os.fstat(self.fd)
        self.identity = state.st_dev, state.st_ino

    def read(self, offset: int, size: int) -> bytes:
        """All `size` bytes, fewer only at the end of the file."""
        data = os.pread(self.fd, size, offset)
        while 0 < len(data) < size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def cached(self, offset: int, size: int) -> bytes | None:
        """Up to INLINE_BYTES if the page cache has all of them, without ever waiting for the disk."""
        made = blank(size)
        try:
            with made.getbuffer() as view:
                count = os.preadv(self.fd, [view], offset, os.RWF_NOWAIT)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return None
            raise
        return made.getvalue() if count == size else None


def _compute(blob: Blob, algorithm: str, fresh: bool) -> tuple[str, object]:
    if fresh:
        os.posix_fadvise(blob.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    digest, view, offset = hashlib.new(algorithm), memoryview(bytearray(BLOCK)), 0
    while count := os.preadv(blob.fd, [view], offset):
        digest.update(view[:count])
        offset += count
    return f"{algorithm}:{digest.hexdigest()}", blob.identity


def _free(directory: Path, names: Sequence[str]) -> None:
    """Remove files and directories in one; another replica may be at them, too."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            try:
                os.unlink(name, dir_fd=fd)
            except IsADirectoryError:
                shutil.rmtree(name, ignore_errors=True, dir_fd=fd)
            except FileNotFoundError:
                continue
    finally:
        os.close(fd)


def make(root: Path) -> Backend:
    """The backend `local` of a service whose own root is `root`."""
    return LocalBackend(root)
