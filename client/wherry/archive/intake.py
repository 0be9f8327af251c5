"""An archive's files, put into content while the archive is read."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING

from wherry_shared.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from wherry_shared.streams import BlobWriter

from ..compression import kind_of
from ..progress import OnProgress, Progress
from ..registry.documents import DOCUMENT_MAX
from ..together import together
from .docker import MANIFEST_FILE, Stored
from .tar import Entry, Reader, follow

if TYPE_CHECKING:
    from ..client import Client

LAYOUT_FILE, INDEX_FILE, LEGACY_FILE = "oci-layout", "index.json", "repositories"
UNNAMED_MAX = 10_000
"""The most files of one archive that are not named by a digest."""
_DOCUMENTS = (LAYOUT_FILE, INDEX_FILE, MANIFEST_FILE, LEGACY_FILE)
_BLOB = re.compile(r"blobs/(sha256|sha512)/([a-f0-9]+)\Z")
_HEX_LENGTH = {"sha256": 64, "sha512": 128}
# docker's old way of telling about a layer, beside it; nobody refers to them.
_NEEDLESS = re.compile(r"[a-f0-9]{64}/(?:VERSION|json)\Z")
_COMMITS = 4
_HEAD = 8
_LINKS_MAX = 16


class Intake:
    """Reads one archive. `documents` are the layout's own files; all else is in content, `files` tells as what.

    Files that a digest names are held to it; of the others the digest is found on the way. Everything that is stored
    is on the lease in the context.
    """

    def __init__(self, client: Client, what: str, on_progress: OnProgress) -> None:
        self._client = client
        self._what = what
        self._on_progress = on_progress
        self._token = secrets.token_hex(8)
        self._commits = asyncio.Semaphore(_COMMITS)
        self._unnamed = 0
        self._opened = 0
        self._writers: set[BlobWriter] = set()
        self.documents: dict[str, bytes] = {}
        self.files: dict[str, Stored] = {}
        self.links: dict[str, tuple[str, str]] = {}

    async def read(self, source: AsyncIterator[bytes]) -> None:
        """Read it to its end."""
        reader = Reader(source, self._what)
        try:
            async with together() as group:
                async for entry in reader:
                    await self._entry(reader, entry, group)
        finally:
            for writer in list(self._writers):
                await asyncio.shield(writer.abort())

    def find(self, name: str) -> Stored:
        """The stored file of a name, through links. NotFound: the archive has no such file."""
        clean = follow("", name, "hardlink")
        for _ in range(_LINKS_MAX):
            if clean in self.files:
                return self.files[clean]
            if clean not in self.links:
                raise NotFound(f"{self._what} has no {name[:200]!r}")
            link, kind = self.links[clean]
            clean = follow(clean, link, kind)
        raise InvalidArgument(f"{self._what}: {name[:200]!r} is a link that leads nowhere")

    def digests(self) -> set[str]:
        """What of the archive is in content."""
        return {stored.digest for stored in self.files.values()}

    # ---- within

    async def _entry(self, reader: Reader, entry: Entry, group: asyncio.TaskGroup) -> None:
        if entry.name in _DOCUMENTS:
            if entry.kind != "file" or entry.name in self.documents:
                raise InvalidArgument(f"{self._what} is ambiguous: {entry.name} is no file, or comes twice")
            self.documents[entry.name] = await reader.read(DOCUMENT_MAX)
        elif entry.kind in ("hardlink", "symlink"):
            follow(entry.name, entry.link, entry.kind)
            self._count()
            self.links[entry.name] = (entry.link, entry.kind)
        elif entry.kind == "file" and not _NEEDLESS.match(entry.name):
            await self._file(reader, entry, group)

    async def _file(self, reader: Reader, entry: Entry, group: asyncio.TaskGroup) -> None:
        expected = _digest_of(entry.name)
        if entry.name.startswith("blobs/") and not expected:
            return  # of an algorithm that nobody may refer to
        if not expected:
            self._count()
        if expected and entry.name in self.files:
            return
        self._opened += 1
        writer = BlobWriter(
            self._client.content, f"import-{self._token}-{self._opened}", total=entry.size, expected=expected,
        )  # fmt: skip
        self._writers.add(writer)  # even if we are stopped while it is opened
        try:
            await writer.__aenter__()
        except AlreadyExists:
            self._writers.discard(writer)
            self.files[entry.name] = Stored(expected, entry.size, kind_of(await _head(reader)))
            self._on_progress(Progress(expected, "exists", "blob", entry.size, entry.size))
            return
        digest, head = await _copy(reader, writer, hash_it=not expected)
        self.files[entry.name] = Stored(expected or digest, entry.size, kind_of(head))
        await self._commits.acquire()
        group.create_task(self._commit(writer, entry.name, expected or digest, entry.size))

    def _count(self) -> None:
        self._unnamed += 1
        if self._unnamed > UNNAMED_MAX:
            raise ResourceExhausted(f"{self._what} has more than {UNNAMED_MAX} files that are no blobs")

    async def _commit(self, writer: BlobWriter, name: str, digest: str, size: int) -> None:
        """Make it a blob, while the next file is read."""
        try:
            with suppress(AlreadyExists):
                await writer.commit(expected=digest)
            self._writers.discard(writer)
        except FailedPrecondition as e:
            raise DataLoss(f"{self._what}: {name} is not what its name says: {e.message}") from None
        finally:
            self._commits.release()
        self._on_progress(Progress(digest, "stored", "blob", size, size))


def _digest_of(name: str) -> str:
    """The digest by which a file of a layout is named, "" for other files."""
    found = _BLOB.match(name)
    if found is None or len(found[2]) != _HEX_LENGTH[found[1]]:
        return ""
    return f"{found[1]}:{found[2]}"


async def _copy(reader: Reader, writer: BlobWriter, *, hash_it: bool) -> tuple[str, bytes]:
    """The current file into an ingest; answers its digest ("" unless asked for) and its first bytes."""
    digest, head = hashlib.sha256(), b""
    async for piece in reader.body():
        head += piece[: _HEAD - len(head)]
        if hash_it:
            digest.update(piece)
        await writer.write(piece)
    return f"sha256:{digest.hexdigest()}" if hash_it else "", head


async def _head(reader: Reader) -> bytes:
    head = b""
    async for piece in reader.body():
        head += piece[: _HEAD - len(head)]
        if len(head) == _HEAD:
            break
    return head
