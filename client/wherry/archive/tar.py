"""Tar as a stream: headers of strangers with bounds, bodies in pieces; and the headers of our own archives.

The standard library parses the 512 bytes of a header block, and nothing else of it is used: the walk, the extended
headers and every bound are here. Nothing is ever extracted.
"""

from __future__ import annotations

import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass

from wherry_shared.errors import DataLoss, InvalidArgument, ResourceExhausted, Unimplemented

BLOCK = 512
ENTRIES_MAX = 100_000
NAME_MAX = 4096
EXTENDED_MAX = 1 << 20
"""Longest extended header (PAX records, a GNU long name), in bytes."""
_EXTENDED_CHAIN_MAX = 16
_TRAILER_MAX = 16 << 20
_ZEROS = bytes(BLOCK)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX, _PAX_GLOBAL, _SOLARIS = tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
_GNU_NAME, _GNU_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_EXTENDED = (_PAX, _PAX_GLOBAL, _SOLARIS, _GNU_NAME, _GNU_LINK)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
# Their bodies are empty whatever their headers say (Go's archive/tar, and so containerd).
_BODILESS = (*_LINKS, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


@dataclass(frozen=True, slots=True)
class Entry:
    """A member. `name` is clean: relative, without `.` and `..`; "" is the root. `size` is the body's, in bytes.

    kind: `file`, `hardlink`, `symlink`, or `other` (directories, devices and what else there is).
    """

    name: str
    kind: str
    size: int
    link: str


class Bytes:
    """An async source, taken in amounts that the reader names."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source
        self._chunk = memoryview(b"")

    async def some(self, limit: int) -> bytes:
        """At least one byte and at most `limit`; none at the end."""
        while not self._chunk:
            chunk = await anext(self._source, b"")
            if not chunk:
                return b""
            self._chunk = memoryview(chunk)
        piece, self._chunk = self._chunk[:limit], self._chunk[limit:]
        return bytes(piece)

    async def take(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end; `size` is small."""
        parts = []
        while size and (piece := await self.some(size)):
            parts.append(piece)
            size -= len(piece)
        return b"".join(parts)


class Reader:
    """`async for entry in reader`, and of each `file` its `body()`; what is not read of it is skipped."""

    def __init__(self, source: AsyncIterator[bytes], what: str) -> None:
        self._bytes = Bytes(source)
        self._what = what
        self._left = 0
        self._padding = 0
        self._entries = 0

    def __aiter__(self) -> Reader:
        return self

    async def __anext__(self) -> Entry:
        entry = await self._next()
        if entry is None:
            await self._trailer()
            raise StopAsyncIteration
        self._entries += 1
        if self._entries > ENTRIES_MAX:
            raise ResourceExhausted(f"{self._what} has more than {ENTRIES_MAX} entries")
        return entry

    async def body(self) -> AsyncIterator[bytes]:
        """The current file's bytes. DataLoss when the archive ends within them."""
        while self._left:
            piece = await self._bytes.some(self._left)
            if not piece:
                raise self._cut_off()
            self._left -= len(piece)
            yield piece

    async def read(self, limit: int) -> bytes:
        """The current file whole; ResourceExhausted, before any of it is read, when it is larger than `limit`."""
        if self._left > limit:
            raise ResourceExhausted(f"{self._what}: a document of {self._left} bytes, {limit} are allowed")
        return b"".join([piece async for piece in self.body()])

    # ---- within

    async def _next(self) -> Entry | None:
        own: dict[str, str] = {}
        for _ in range(_EXTENDED_CHAIN_MAX):
            await self._finish_body()
            block = await self._bytes.take(BLOCK)
            if not block or block == _ZEROS:
                return None
            if len(block) < BLOCK:
                raise self._cut_off() if self._entries else InvalidArgument(f"{self._what} is not a tar archive")
            info = self._parse(block)
            if info.type not in _EXTENDED:
                return self._entry(info, own)
            self._begin_body(info.size)
            own |= await self._extended(info)
        raise InvalidArgument(f"{self._what}: more than {_EXTENDED_CHAIN_MAX} extended headers on one entry")

    async def _finish_body(self) -> None:
        async for _ in self.body():
            pass
        if len(await self._bytes.take(self._padding)) < self._padding:
            raise self._cut_off()
        self._padding = 0

    def _begin_body(self, size: int) -> None:
        self._left, self._padding = size, -size % BLOCK

    def _parse(self, block: bytes) -> tarfile.TarInfo:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError) as e:
            raise InvalidArgument(f"{self._what} is not a tar archive, or is damaged: {e}") from None
        if not 0 <= info.size < 1 << 62:
            raise InvalidArgument(f"{self._what}: {_show(info.name)} has no valid size")
        return info

    async def _extended(self, info: tarfile.TarInfo) -> dict[str, str]:
        if info.size > EXTENDED_MAX:
            raise ResourceExhausted(f"{self._what}: an extended header of {info.size} bytes")
        data = await self.read(EXTENDED_MAX)
        if info.type in (_GNU_NAME, _GNU_LINK):
            key = "path" if info.type == _GNU_NAME else "linkpath"
            return {key: data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
        return {} if info.type == _PAX_GLOBAL else self._records(data)

    def _records(self, data: bytes) -> dict[str, str]:
        """PAX records (POSIX.1-2001): `<length> <key>=<value>\\n`."""
        records: dict[str, str] = {}
        while data.strip(b"\0"):
            digits, _, _ = data[:20].partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            record, data = data[len(digits) + 1 : length], data[length:]
            key, equals, value = record.partition(b"=")
            if not equals or not value.endswith(b"\n") or length > len(record) + len(digits) + 1:
                raise InvalidArgument(f"{self._what}: a PAX record is damaged")
            records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        return records

    def _entry(self, info: tarfile.TarInfo, own: dict[str, str]) -> Entry:
        name = own.get("path", info.name)
        if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in own):
            raise Unimplemented(f"{self._what}: {_show(name)} is a sparse file")
        size = info.size
        if "size" in own:
            if not own["size"].isascii() or not own["size"].isdigit() or len(own["size"]) > 18:
                raise InvalidArgument(f"{self._what}: {_show(name)} has no valid size")
            size = int(own["size"])
        if info.type in _BODILESS or (info.type == tarfile.AREGTYPE and name.endswith("/")):
            size = 0
        self._begin_body(size)
        kind = "file" if info.type in _REGULAR and not name.endswith("/") else "other"
        if info.type in _LINKS:
            kind = "hardlink" if info.type == tarfile.LNKTYPE else "symlink"
        return Entry(self._clean(name), kind, size, own.get("linkpath", info.linkname))

    def _clean(self, name: str) -> str:
        if len(name) > NAME_MAX:
            raise InvalidArgument(f"{self._what}: a name of {len(name)} characters")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or "\0" in name:
            raise InvalidArgument(f"{self._what}: the name {_show(name)} leads out of the archive")
        return "/".join(parts)

    async def _trailer(self) -> None:
        """Read what comes after the end: whoever writes the other end of a pipe gets to its own end, too."""
        left = _TRAILER_MAX
        while left > 0 and (piece := await self._bytes.some(left)):
            left -= len(piece)

    def _cut_off(self) -> DataLoss:
        return DataLoss(f"{self._what} is cut off")


def follow(name: str, link: str, kind: str) -> str:
    """The member that a link means: a hard link counts from the root, a symlink from its place. InvalidArgument when
    it leads out of the archive."""
    if link.startswith("/"):
        raise InvalidArgument(f"the link {_show(name)} leads out of the archive, to {_show(link)}")
    parts = name.split("/")[:-1] if kind == "symlink" else []
    for part in link.split("/"):
        if part == "..":
            if not parts:
                raise InvalidArgument(f"the link {_show(name)} leads out of the archive, to {_show(link)}")
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def header(name: str, size: int = 0, *, directory: bool = False) -> bytes:
    """The header of a file (or directory) of ours: no owner, no time, so that archives repeat byte for byte."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o755 if directory else 0o644
    info.type = tarfile.DIRTYPE if directory else tarfile.REGTYPE
    return info.tobuf(tarfile.PAX_FORMAT)


def padding(size: int) -> bytes:
    """What fills a body of `size` bytes up to whole blocks."""
    return bytes(-size % BLOCK)


END = bytes(2 * BLOCK)
"""What an archive ends with."""


def _show(name: str) -> str:
    return repr(name[:100])
