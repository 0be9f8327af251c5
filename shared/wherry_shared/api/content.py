"""The content service: the committed blobs of one namespace, and the ingests on their way (containerd's rules)."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Protocol

from ..contract import Contract, endpoint
from ..errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)  # fmt: skip
from ..records import Record, record
from ..values import Digest, Labels, Model, Name, Page

CHUNK = 960 * 1024
"""The most bytes of one read's answer and of one write: with all that goes with them they fit into 1 MiB."""


@record
class Info(Record):
    """What is known of a committed blob."""

    digest: Digest
    size: int
    labels: dict[str, str] = {}
    created_at: datetime
    updated_at: datetime


class Ingest(Model):
    """A blob on its way. `offset` is how many bytes are there; `total` and `expected` what was announced (0, "").

    durable: how many of them are there after a power cut, too; a killed service loses none.
    """

    ref: str
    offset: int
    durable: int = 0
    total: int = 0
    expected: str = ""
    started_at: datetime
    updated_at: datetime


def ingest_file(namespace: str, ref: str) -> str:
    """How the path of an ingest's file ends; a caller opens no other file for writing, whatever it is told."""
    return f"/ingest/{hashlib.sha256(f'{namespace}/{ref}'.encode()).hexdigest()}/data"


def blob_file(digest: str) -> str:
    """How the path of a blob's file ends."""
    algorithm, _, encoded = digest.partition(":")
    return f"/blobs/{algorithm}/{encoded}"


class Opened(Model):
    """An ingest held open for its writer.

    instance: the replica that holds it; writes, close and the commit go to that one.
    path, device, inode: the file of the bytes, "" where it is none. A caller who sees that very file (same device
    and inode, path as `ingest_file` says) may append to it instead of calling `write`; the service verifies it at
    commit all the same. It may only append, since bytes are hashed as they come: `write(ref, 0, b"")` starts over.
    complete: the expected blob is in another namespace that shares it: `offset` is its size, no byte need be sent,
    and the commit makes it visible in this one. What is written all the same goes behind a copy of it.
    """

    ref: str
    offset: int
    instance: str
    path: str
    device: int
    inode: int
    complete: bool = False


class Located(Model):
    """Where a blob's bytes lie on the node's disk, "" where they are no file of their own.

    Whoever sees that very file (device and inode, path as `blob_file` says) may read it.
    """

    path: str
    size: int
    device: int
    inode: int


EVENTS = {
    "/content/create": "digest size",
    "/content/delete": "digest",
}


class Content(Contract, Protocol, service="content", version="1.0.0", events=EVENTS):
    """The committed blobs of one namespace, addressed by digest, and the ingests on their way."""

    @endpoint(NotFound)
    async def info(self, digest: Digest) -> Info:
        """Tell what is known of one blob."""
        ...

    @endpoint(NotFound, mutates=True)
    async def update(self, digest: Digest, labels: Labels, mask: list[str] = []) -> Info:
        """Change a blob's labels. `mask`: `labels` or `labels.<key>`; empty replaces all."""
        ...

    @endpoint()
    async def walk(self, filters: list[str] = [], after: str = "", limit: int = 1000) -> Page[Info]:
        """A window of the blobs that any filter matches, in digest order."""
        ...

    @endpoint(NotFound, mutates=True)
    async def delete(self, digest: Digest) -> None:
        """Forget a blob in this namespace; its bytes go when no namespace knows it."""
        ...

    @endpoint(NotFound, OutOfRange, DataLoss)
    async def read(self, digest: Digest, offset: int = 0, size: int = CHUNK) -> bytes:
        """Up to `size` (at most 960 KiB) bytes from `offset`; empty at the end. Readers keep several in flight."""
        ...

    @endpoint(NotFound)
    async def locate(self, digest: Digest) -> Located:
        """Where the bytes lie, for readers on the same host."""
        ...

    @endpoint(NotFound, DataLoss, waits=True, timeout=600.0)
    async def verify(self, digest: Digest) -> None:
        """Read all of a blob again and compare.

        DataLoss: the bytes are not what they were. They are put aside then: reads fail, and the next upload of
        the digest, which `open` lets through, heals it in every namespace.
        """
        ...

    @endpoint(AlreadyExists, NotFound, Unavailable, ResourceExhausted, mutates=True)
    async def open(self, ref: Name, total: int = 0, expected: str = "", truncate: bool = False) -> Opened:
        """Open or resume the ingest `ref` and lock it for this writer.

        The lock ends with close, commit or abort, with its instance, and after 60 s without a write or a `status`.
        AlreadyExists: the expected blob is in this namespace, and the ingest is gone. Unavailable: another writer
        holds the ref: wait, longer each time, and open again. NotFound: there is no such lease. truncate: begin with
        no bytes, also where the blob could be had from another namespace.
        """
        ...

    @endpoint(NotFound, OutOfRange, ResourceExhausted, mutates=True)
    async def write(self, ref: Name, offset: int, data: bytes) -> int:
        """Append `data` (at most 960 KiB) at `offset`, which must be the current end; offset 0 starts over.

        Answers the new end. Goes to the instance that opened the ingest; NotFound when that does not hold it (any
        more), and then a new `open` tells how much is there.
        """
        ...

    @endpoint(AlreadyExists, FailedPrecondition, Aborted, NotFound, ResourceExhausted, mutates=True, timeout=120.0)
    async def commit(self, ref: Name, size: int = 0, expected: str = "", labels: Labels = {}) -> Info:
        """Verify the ingest and make it a blob, durably.

        FailedPrecondition: size or digest differ; the ingest stays with its bytes. AlreadyExists: the blob was
        there, and the ingest is gone. Aborted: it was `complete`, and the blob went meanwhile: `open` it truncated
        and send the bytes. Goes to the instance that opened the ingest.
        """
        ...

    @endpoint(AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted, mutates=True)
    async def put(self, data: bytes, expected: Digest, labels: Labels = {}) -> Info:
        """Make `data` (at most 960 KiB) a blob, durably: what open, write and commit do, in one call without a ref.

        AlreadyExists: the blob is in this namespace. FailedPrecondition: the bytes have another digest. NotFound:
        there is no such lease.
        """
        ...

    @endpoint(NotFound, mutates=True)
    async def close(self, ref: Name) -> None:
        """Let go of an ingest and keep its bytes for a later `open`. Goes to the instance that opened it."""
        ...

    @endpoint(NotFound)
    async def status(self, ref: Name) -> Ingest:
        """How far an ingest is."""
        ...

    @endpoint()
    async def statuses(self, filters: list[str] = []) -> list[Ingest]:
        """Every ingest of the namespace that any filter on `ref` matches."""
        ...

    @endpoint(NotFound, mutates=True)
    async def abort(self, ref: Name) -> None:
        """Remove an ingest and its bytes."""
        ...
