"""Content in memory: for tests, and for a node that forgets. One process; nothing survives it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

from wherry_shared.api.content import Located
from wherry_shared.errors import DataLoss, FailedPrecondition, NotFound, OutOfRange, Unavailable
from wherry_shared.values import now

from . import Backend, Place, Progress, Whole
from .whole import WholeIngest


class MemoryIngest:
    """A held ingest. The backend's entry for its key is this one's bytes until it is aborted."""

    def __init__(self, backend: MemoryBackend, key: str, what: str, data: bytearray) -> None:
        self._backend = backend
        self._key = key
        self._what = what
        self._data = data
        self._open = True

    @property
    def place(self) -> Place:
        return Place()

    def size(self) -> int:
        self.check()
        return len(self._data)

    def activity(self) -> object:
        return self.size(), self._backend.touched.get(self._key)

    async def append(self, offset: int, data: bytes) -> int:
        if offset != self.size():
            raise OutOfRange(f"{self._what} ends at {len(self._data)}, and not at {offset}")
        self._data += data
        self._backend.updated[self._key] = now()
        return len(self._data)

    async def copy(self, digest: str) -> None:
        self.check()
        self._data[:] = self._backend.stored[digest]

    async def truncate(self) -> None:
        self.check()
        self._data.clear()

    async def digest(self, algorithm: str) -> tuple[str, int]:
        self.check()
        return f"{algorithm}:{hashlib.new(algorithm, self._data).hexdigest()}", len(self._data)

    async def seal(self) -> None:
        self.check()

    def settle(self, digest: str, size: int) -> None:
        if self.size() != size:
            raise FailedPrecondition(f"{self._what} has changed while it was committed")
        self._backend.stored[digest] = bytes(self._data)

    def unsettle(self, digest: str) -> None:
        self._backend.stored.pop(digest, None)

    def check(self) -> None:
        if not self._open or self._backend.ingests.get(self._key) is not self._data:
            raise NotFound(f"{self._what} is not open any more")

    async def release(self, *, keep: bool) -> None:
        if not self._open:
            return
        self._open = False
        if self._backend.held.get(self._key) is self:
            del self._backend.held[self._key]
            if not keep:
                self._backend.ingests.pop(self._key, None)


class MemoryBackend:
    """Blobs and ingests in dictionaries."""

    replicable = False

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.ingests: dict[str, bytearray] = {}
        self.held: dict[str, MemoryIngest] = {}
        self.updated = {"": now()}
        self.touched: dict[str, int] = {}
        self._ticks = itertools.count()

    async def start(self) -> None:
        return None

    async def close(self) -> None:
        return None

    async def open(self, key: str, what: str) -> MemoryIngest:
        if key in self.held:
            raise Unavailable(f"{what} is locked: another writer has it open")
        data = self.ingests.setdefault(key, bytearray())
        self.updated.setdefault(key, now())
        held = self.held[key] = MemoryIngest(self, key, what, data)
        return held

    def whole(self, data: bytes, digest: str, what: str) -> Whole:
        return WholeIngest(self, data, what)

    async def progress(self, key: str) -> Progress | None:
        data = self.ingests.get(key)
        return None if data is None else Progress(len(data), self.updated[key])

    async def touch(self, key: str) -> None:
        self.touched[key] = next(self._ticks)

    def detach(self, key: str) -> None:
        for entries in (self.ingests, self.held, self.updated, self.touched):
            entries.pop(key, None)

    async def purge(self) -> None:
        return None

    async def sweep(self, known: Callable[[str], bool]) -> int:
        gone = [key for key in self.ingests if key not in self.held and not known(key)]
        for key in gone:
            self.detach(key)
        return len(gone)

    def has(self, digest: str, size: int) -> bool:
        return len(self.stored.get(digest, b"")) == size and digest in self.stored

    async def size(self, digest: str) -> int | None:
        data = self.stored.get(digest)
        return None if data is None else len(data)

    async def read(self, digest: str, offset: int, size: int) -> bytes:
        return self._bytes(digest)[offset : offset + size]

    async def locate(self, digest: str) -> Located | None:
        data = self.stored.get(digest)
        return None if data is None else Located(path="", size=len(data), device=0, inode=0)

    async def compute(self, digest: str, *, fresh: bool = False) -> tuple[str, object]:
        data = self._bytes(digest)
        algorithm = digest.partition(":")[0]
        return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}", id(data)

    def blobs(self) -> list[str]:
        return list(self.stored)

    def remove(self, digest: str) -> None:
        self.stored.pop(digest, None)

    def quarantine(self, digest: str, identity: object) -> str:
        if id(self.stored.get(digest)) == identity:
            del self.stored[digest]
        return ""

    async def tidy(self) -> None:
        return None

    def _bytes(self, digest: str) -> bytes:
        try:
            return self.stored[digest]
        except KeyError:
            raise DataLoss(f"blob {digest} has a record and no bytes: upload it again") from None


def make(root: Path) -> Backend:
    """The backend `memory`; `root` is not used."""
    return MemoryBackend()
