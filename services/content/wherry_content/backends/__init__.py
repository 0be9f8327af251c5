"""The port under the store: where bytes lie. A backend knows digests and keys, no namespaces, no refs and no rules.

A backend is found by name: the built-in ones, then the entry points of group `wherry.content.backends`, each a
callable `make(root: Path) -> Backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from wherry_shared.api.content import Located
from wherry_shared.errors import NotFound

GROUP = "wherry.content.backends"
BUILT_IN = {"local": "wherry_content.backends.local", "memory": "wherry_content.backends.memory"}


@dataclass(frozen=True, slots=True)
class Place:
    """The file under an ingest; path "" where there is none."""

    path: str = ""
    device: int = 0
    inode: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How many bytes an ingest has, and when it got the last."""

    offset: int
    updated_at: datetime


class Held(Protocol):
    """An ingest that this process holds open, locked against every other opener on the same root.

    Methods may run at the same time; the bytes are what some order of them gives. Those marked "under the lock" are
    called in the metadata's write transaction, which all replicas share: short, synchronous, and they may be
    called twice.
    """

    @property
    def place(self) -> Place: ...

    def size(self) -> int:
        """Bytes there. NotFound once it was aborted elsewhere."""
        ...

    def activity(self) -> object:
        """A value that changes whenever anybody wrote to the ingest or touched it. NotFound: aborted elsewhere."""
        ...

    async def append(self, offset: int, data: bytes) -> int:
        """Add bytes at the end, which `offset` must be; answers the new end.

        OutOfRange: it is not. NotFound: aborted elsewhere. ResourceExhausted: no space, and nothing was added.
        """
        ...

    async def truncate(self) -> None:
        """Start over with no bytes."""
        ...

    async def digest(self, algorithm: str) -> tuple[str, int]:
        """The digest of all bytes, `sha256:...` or `sha512:...`, and how many they are."""
        ...

    async def seal(self) -> None:
        """Make the bytes durable."""
        ...

    def settle(self, digest: str, size: int) -> None:
        """Under the lock: make the bytes the blob `digest`, durably, in the place of what may be there.

        FailedPrecondition when they are not `size` bytes (any more).
        """
        ...

    def unsettle(self, digest: str) -> None:
        """Under the lock: take a `settle` back, whose transaction failed."""
        ...

    def check(self) -> None:
        """Under the lock: NotFound when it was aborted elsewhere since it was opened."""
        ...

    async def release(self, *, keep: bool) -> None:
        """Unlock; without `keep` the bytes go, too. A second call does nothing."""
        ...


class Backend(Protocol):
    """Blobs by digest and ingests by key (64 hex characters)."""

    async def start(self) -> None:
        """Make ready. Errors of the disk come here."""
        ...

    async def close(self) -> None:
        """Let go of everything."""
        ...

    async def open(self, key: str, what: str) -> Held:
        """Hold the ingest `key` with the bytes it has, making it when it is not there; `what` names it in errors.

        Unavailable: it is held already. ResourceExhausted: no space, no inode.
        """
        ...

    def progress(self, key: str) -> Progress | None:
        """How far an ingest is, held or not; None when it has no bytes here."""
        ...

    def touch(self, key: str) -> None:
        """Note that somebody cares for an ingest (see `Held.activity`)."""
        ...

    def detach(self, key: str) -> None:
        """Under the lock: take an ingest out of sight, held or not, for `purge`."""
        ...

    async def purge(self) -> None:
        """Free the bytes of what was detached or removed."""
        ...

    def sweep(self, known: Callable[[str], bool]) -> int:
        """Detach the ingests that nobody holds and whose key is not known, which is asked while each is locked."""
        ...

    def has(self, digest: str, size: int) -> bool:
        """Whether the blob is there with that size."""
        ...

    async def read(self, digest: str, offset: int, size: int) -> bytes:
        """Bytes of a blob, fewer only at its end. DataLoss: it is not there, or the disk fails."""
        ...

    def locate(self, digest: str) -> Located | None:
        """Where a blob lies; path "" where it is no file. None: it is not there."""
        ...

    async def compute(self, digest: str, *, fresh: bool = False) -> tuple[str, object]:
        """The digest of the bytes that are there now, by the same algorithm, and the identity of those bytes.

        fresh: from the disk, not from the cache. DataLoss: there are none, or the disk fails.
        """
        ...

    def blobs(self) -> list[str]:
        """The digests of all blobs."""
        ...

    def remove(self, digest: str) -> None:
        """Under the lock: remove a blob, for `purge`; one that is gone is no error. Who reads it goes on."""
        ...

    def quarantine(self, digest: str, identity: object) -> str:
        """Under the lock: put a rotten blob aside if it is still that one; answers where it lies now, or ""."""
        ...

    async def tidy(self) -> None:
        """What is to be done every few seconds."""
        ...


Make = Callable[[Path], Backend]


def find(name: str) -> Make:
    """The maker of the backend `name`. NotFound, with the names there are."""
    if name in BUILT_IN:
        make: Make = import_module(BUILT_IN[name]).make
        return make
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise NotFound(f"no content backend {name!r}; there are: {', '.join(sorted({*BUILT_IN, *found}))}")
    loaded: Make = found[name].load()
    return loaded
