"""An ingest as a file: locked by flock on its directory, hashed while it grows, whoever appends to it."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from aiofiles.os import wrap
from wherry_shared.errors import FailedPrecondition, NotFound, OutOfRange, Unavailable, WherryError
from wherry_shared.files import os_errors

from . import Place
from .durable import NOTE, Directory, Note

T = TypeVar("T")
Target = Callable[[str], tuple[Path, Directory]]
"""Where a blob's file lies, by digest: its path, and the directory that it is in."""

DATA = "data"
BLOCK = 256 << 10  # stays in the processor's cache between read and hash
STEP = 32 << 20  # bytes hashed before somebody else's turn on the thread: 20 ms
FOLLOW_SECONDS = 0.03
FOLLOW_BYTES = 1 << 20
SAVE_BYTES = 32 << 20  # bytes after which they are made durable: the disk writes while the next ones come
_OPEN = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class LocalIngest:
    """A held ingest.

    Bytes are appended by `append`, or by a local writer to the file itself. The running hash covers the first
    `_hashed` bytes: `append` extends it at once, and a task follows what others append. Every SAVE_BYTES they are
    made durable, and the note says how far. Locks are taken in the order `_saving`, `_hash`, `_order`; the event loop
    takes none of them.
    """

    def __init__(self, what: str, path: Path, fds: tuple[int, int], pool: Executor, target: Target) -> None:
        self._what = what
        self._path = path
        self._directory, self._data = fds
        self._pool = pool
        self._target = target
        self._mutex = threading.Lock()
        self._users = 0
        self._closed = False
        self._order = threading.Lock()  # one append or truncation at a time
        self._hash = threading.Lock()
        self._saving = threading.Lock()
        self._saver: asyncio.Future[None] | None = None
        self._unsaved: OSError | None = None  # the kernel tells a failed write-back once only, whoever asks first
        self._restart("sha256")
        self._follower: asyncio.Task[None] | None = None
        self._note = Note(self._directory)
        limit = self._note.limit()
        if limit is not None and os.fstat(self._data).st_size > limit:
            os.ftruncate(self._data, limit)  # it is from before the machine went down
        state = os.fstat(self._data)
        self._place = Place(str(path / DATA), state.st_dev, state.st_ino)

    @classmethod
    def acquire(cls, what: str, path: Path, pool: Executor, target: Target) -> LocalIngest:
        """Make or find the ingest's directory and lock it. Unavailable: another opener has it."""
        with os_errors(what):
            while True:
                with suppress(FileExistsError):
                    os.mkdir(path, 0o700)
                try:
                    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                try:
                    data = _lock(what, path, directory)
                except BaseException:
                    os.close(directory)
                    raise
                if data is not None:
                    return cls(what, path, (directory, data), pool, target)
                os.close(directory)

    def follow(self) -> None:
        """Begin to hash what is there and what comes."""
        self._follower = asyncio.create_task(self._follow())

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Keep the descriptors open inside: no thread finds its file closed, or another in its place."""
        with self._mutex:
            if self._closed:
                raise NotFound(f"{self._what} is not open any more")
            self._users += 1
        try:
            with os_errors(self._what):
                yield
        finally:
            with self._mutex:
                self._users -= 1
                last = self._closed and not self._users
            if last:
                self._close()

    def _close(self) -> None:
        os.close(self._data)
        os.close(self._directory)  # and with it the lock

    # ---- bytes

    @property
    def place(self) -> Place:
        return self._place

    def size(self) -> int:
        with self._using():
            return self._size()

    def _size(self) -> int:
        state = os.fstat(self._data)
        if not state.st_nlink:
            raise NotFound(f"{self._what} was aborted meanwhile")
        return state.st_size

    def activity(self) -> object:
        with self._using():
            return self._size(), os.fstat(self._data).st_mtime_ns, os.fstat(self._directory).st_mtime_ns

    async def append(self, offset: int, data: bytes) -> int:
        # Not aiofiles' file object: write and hash in one hop to a thread take half the time of two.
        return await self._in_thread(self._append, offset, data)

    def _append(self, offset: int, data: bytes) -> int:
        with self._using(), self._order:
            end = self._size()
            if offset != end:
                raise OutOfRange(f"{self._what} ends at {end}, and not at {offset}")
            try:
                self._write_all(data)
            except OSError:
                os.ftruncate(self._data, end)
                raise
            # A follower in the middle of a step takes these bytes along: no need to wait for it.
            if self._hash.acquire(blocking=False):
                try:
                    if self._hashed == offset:
                        self._digest.update(data)
                        self._hashed += len(data)
                finally:
                    self._hash.release()
        return offset + len(data)

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._data, view) :]

    async def copy(self, digest: str) -> None:
        await self._in_thread(self._copy, digest)

    def _copy(self, digest: str) -> None:
        self._truncate()
        with self._using(), open(self._target(digest)[0], "rb", buffering=0) as blob, self._order:
            while data := blob.read(4 * BLOCK):
                self._write_all(data)

    async def truncate(self) -> None:
        await self._in_thread(self._truncate)

    def _truncate(self) -> None:
        with self._using(), self._saving, self._hash, self._order:
            if self._size():
                self._note.set(0)
                os.ftruncate(self._data, 0)
            self._restart(self._algorithm)

    # ---- the running hash

    def _restart(self, algorithm: str) -> None:
        self._algorithm, self._digest, self._hashed = algorithm, hashlib.new(algorithm), 0

    async def _follow(self) -> None:
        while True:
            try:
                size = self.size()
                if size - self._note.count >= SAVE_BYTES and (self._saver is None or self._saver.done()):
                    self._saver = asyncio.ensure_future(self._in_thread(self._save))
                if size - self._hashed >= FOLLOW_BYTES:
                    await self._in_thread(self._step)
                    continue
            except WherryError:
                return  # it is closed, or has an error that the commit will meet and tell
            await asyncio.sleep(FOLLOW_SECONDS)

    def _step(self) -> None:
        with self._using(), self._hash:
            self._advance()

    def _advance(self) -> int:
        """Hash up to STEP further bytes; answers how many are left."""
        size = self._size()
        if size < self._hashed:
            self._restart(self._algorithm)  # whoever writes to the file has begun anew
        stop = min(size, self._hashed + STEP)
        view = memoryview(bytearray(BLOCK))
        while self._hashed < stop:
            count = os.preadv(self._data, [view[: stop - self._hashed]], self._hashed)
            if not count:
                break
            self._digest.update(view[:count])
            self._hashed += count
        return self._size() - self._hashed

    async def digest(self, algorithm: str) -> tuple[str, int]:
        return await self._in_thread(self._finish_digest, algorithm)

    def _finish_digest(self, algorithm: str) -> tuple[str, int]:
        with self._using(), self._hash:
            if algorithm != self._algorithm:
                self._restart(algorithm)
            while self._advance() > 0:
                pass
            return f"{algorithm}:{self._digest.hexdigest()}", self._hashed

    # ---- durability

    def _save(self) -> None:
        """Make durable what is there now, and note how much it is. An error is kept for the commit to tell."""
        with suppress(WherryError), self._using(), self._saving:
            size = self._size()
            self._sync(os.fdatasync)
            self._note.set(min(size, self._size()))

    def _sync(self, sync: Callable[[int], None]) -> None:
        if self._unsaved is not None:
            raise self._unsaved
        try:
            sync(self._data)
        except OSError as e:
            self._unsaved = e
            self._note.distrust()
            raise

    # ---- the end

    async def seal(self) -> None:
        await self._in_thread(self._seal)

    def _seal(self) -> None:
        with self._using(), self._saving:
            os.fchmod(self._data, 0o444)
            self._sync(os.fsync)

    def check(self) -> None:
        with self._using():
            if not same_file(self._path, self._directory):
                raise NotFound(f"{self._what} was aborted meanwhile")

    def settle(self, digest: str, size: int) -> None:
        target, directory = self._target(digest)
        with self._using():
            if self._size() != size:
                raise FailedPrecondition(f"{self._what} has changed while it was committed")
            if not same_file(target, self._data):  # it is, when the transaction runs a second time
                os.rename(DATA, target, src_dir_fd=self._directory)
            directory.sync()

    def unsettle(self, digest: str) -> None:
        target, _ = self._target(digest)
        with self._using():
            os.fchmod(self._data, 0o600)
            if same_file(target, self._data):
                os.rename(target, DATA, dst_dir_fd=self._directory)

    async def release(self, *, keep: bool) -> None:
        if self._follower is not None:
            self._follower.cancel()
            self._follower = None
        await self._in_thread(self._release, keep)

    def _release(self, keep: bool) -> None:
        with suppress(NotFound), self._using():
            if not keep:
                self._remove()
            elif os.fstat(self._data).st_size != self._note.count:
                self._save()
            self._closed = True  # the last user closes, at the latest this one

    def _remove(self) -> None:
        for name in (DATA, NOTE):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._directory)
        if same_file(self._path, self._directory):
            with suppress(OSError):  # one that is left empty is swept at the next start
                os.rmdir(self._path)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await wrap(function)(*args, executor=self._pool)


def _lock(what: str, path: Path, directory: int) -> int | None:
    """The data file, open, of the directory, locked; None when the directory is not the ingest's any more."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Unavailable(f"{what} is locked: another writer has it open") from None
    if not same_file(path, directory):
        return None
    with suppress(FileNotFoundError):
        os.chmod(DATA, 0o600, dir_fd=directory)  # a commit that a crash cut short had sealed it
    try:
        return os.open(DATA, _OPEN, 0o600, dir_fd=directory)
    except FileNotFoundError:
        return None


def same_file(path: Path, fd: int) -> bool:
    """Whether `path` names the open file or directory `fd`."""
    try:
        state = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(state, os.fstat(fd))
