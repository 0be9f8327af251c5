"""The port under the store: where bytes lie. A backend knows digests and keys, no namespaces, no refs and no rules.

A backend is found by name (`--set backend=NAME`): the built-in ones, then the entry points of group
`wherry.content.backends` of whatever is installed beside the service, each a callable `make(root: Path) -> Backend`:

    [project.entry-points."wherry.content.backends"]
    bucket = "my_package.bucket:make"

`pytest --backend=content/bucket` runs the conformance suite on it, in process and over NATS. What it has to do:

* Keep ingests by key and blobs by digest. Nothing here asks for files: `Place()` and `Located(path="")` say that
  there is none, and bytes then travel over the bus.
* `Held.seal` ends with the bytes where a power cut, or the loss of this machine, does not reach them, and may give them
  a name of their own there (an upload completed under a temporary one). `Held.settle` makes them the blob, or finds
  that another holder's are: the same digest is the same bytes, so whichever comes last may win.
* `whole` may answer `whole.WholeIngest(self, data, what)`, which does it by an ingest, or something quicker.
* Bytes of an ingest before `seal` may be kept as the backend can: `open` says how many are there, and whoever writes
  goes on from it. Parts of an upload that were acknowledged must not be lost with the process, unless `progress`
  goes back with them.
* What is called "under the lock" runs in the writer thread of the service's database, in a transaction that all
  replicas on a root share. It may wait for a network, a second at most: every mutation of the node waits with it.
  It may run twice. The event loop never runs it.
* An exclusive lock for each open ingest, which dies with its holder (a file lock, or a lease in the store that is
  renewed while the ingest is held).
* `replicable` is True where several processes may serve the same blobs: then replicas see each other's work at once.
* It raises the errors of `wherry_shared.errors`: ResourceExhausted for a full store, DataLoss for one that is damaged,
  Unavailable for one that cannot be reached.
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
    """How many bytes an ingest has, when it got the last, and how many of them outlive the machine."""

    offset: int
    updated_at: datetime
    durable: int = 0


class Settling(Protocol):
    """Bytes that are durable, and become a blob with its row."""

    def settle(self, digest: str, size: int) -> None:
        """Under the lock: make the bytes the blob `digest`, durably, in the place of what may be there.

        FailedPrecondition when they are not `size` bytes (any more).
        """
        ...

    def unsettle(self, digest: str) -> None:
        """Under the lock: take a `settle` back, whose transaction failed."""
        ...


class Whole(Settling, Protocol):
    """A blob's bytes that came in one call, its digest known to be theirs. `seal` comes first, `close` last."""

    async def seal(self) -> None:
        """Make the bytes durable. ResourceExhausted: no space.

        They may have the blob's name from now on, unless it is taken. Until `settle` no row stands for it, so others
        may remove it again; after an error `unsettle` is called.
        """
        ...

    async def close(self) -> None:
        """Free what has not become the blob."""
        ...


class Held(Settling, Protocol):
    """An ingest that this process holds open, locked against every other opener on the same root.

    Methods may run at the same time; the bytes are what some order of them gives. `size` and `activity` are asked by
    the event loop and answer at once, from what is known here.
    """

    @property
    def place(self) -> Place: ...

    def size(self) -> int:
        """Bytes there. NotFound once it is known that it was aborted elsewhere."""
        ...

    def activity(self) -> object:
        """A value that changes whenever anybody wrote to the ingest or touched it. NotFound: as for `size`."""
        ...

    async def append(self, offset: int, data: bytes) -> int:
        """Add bytes at the end, which `offset` must be; answers the new end.

        OutOfRange: it is not. NotFound: aborted elsewhere. ResourceExhausted: no space, and nothing was added.
        """
        ...

    async def truncate(self) -> None:
        """Start over with no bytes."""
        ...

    async def copy(self, digest: str) -> None:
        """Start over with the bytes of a blob. NotFound: it is gone."""
        ...

    async def digest(self, algorithm: str) -> tuple[str, int]:
        """The digest of all bytes, `sha256:...` or `sha512:...`, and how many they are."""
        ...

    async def seal(self) -> None:
        """Make the bytes durable."""
        ...

    def check(self) -> None:
        """Under the lock: NotFound when it was aborted elsewhere since it was opened."""
        ...

    async def release(self, *, keep: bool) -> None:
        """Unlock; without `keep` the bytes go, too. A second call does nothing."""
        ...


class Backend(Protocol):
    """Blobs by digest and ingests by key (64 hex characters)."""

    replicable: bool

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

    def whole(self, data: bytes, digest: str, what: str) -> Whole:
        """Begin with a blob that is at hand whole; `what` names it in errors."""
        ...

    async def progress(self, key: str) -> Progress | None:
        """How far an ingest is, held or not; None when it has no bytes here."""
        ...

    async def touch(self, key: str) -> None:
        """Note that somebody cares for an ingest (see `Held.activity`)."""
        ...

    def detach(self, key: str) -> None:
        """Under the lock: take an ingest out of sight, held or not, for `purge`."""
        ...

    async def purge(self) -> None:
        """Free the bytes of what was detached or removed."""
        ...

    async def sweep(self, known: Callable[[str], bool]) -> int:
        """Detach the ingests that nobody holds and whose key is not known, which is asked while each is locked."""
        ...

    def has(self, digest: str, size: int) -> bool:
        """Under the lock: whether the blob is there with that size."""
        ...

    async def size(self, digest: str) -> int | None:
        """How large the blob is that is there; None: there is none."""
        ...

    async def read(self, digest: str, offset: int, size: int) -> bytes:
        """Bytes of a blob, fewer only at its end. DataLoss: it is not there, or the disk fails."""
        ...

    async def locate(self, digest: str) -> Located | None:
        """Where a blob lies; path "" where it is no file. None: it is not there."""
        ...

    async def compute(self, digest: str, *, fresh: bool = False) -> tuple[str, object]:
        """The digest of the bytes that are there now, by the same algorithm, and the identity of those bytes.

        fresh: from the disk, not from the cache. DataLoss: there are none, or the disk fails.
        """
        ...

    def blobs(self) -> list[str]:
        """The digests of all blobs. Called in a thread once the service is up: it may take its time."""
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
