"""Layers: tar streams whose bytes depend on nothing but their entries, in the encodings that registries carry."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zstandard

MTIME = 1686355200  # 10 June 2023, the release day of Debian 12: one moment for every entry, so that digests repeat
MEDIA_TYPES = {
    "tar": "application/vnd.oci.image.layer.v1.tar",
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tar entry. `path` is relative and without a leading `./`; `kind` is one of tarfile's type flags."""

    path: str
    kind: bytes = tarfile.REGTYPE
    mode: int = 0o644
    data: bytes = b""
    target: str = ""
    uid: int = 0
    gid: int = 0


def directory(path: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Entry:
    return Entry(path, tarfile.DIRTYPE, mode, uid=uid, gid=gid)


def symlink(path: str, target: str) -> Entry:
    return Entry(path, tarfile.SYMTYPE, 0o777, target=target)


def hardlink(path: str, target: str) -> Entry:
    return Entry(path, tarfile.LNKTYPE, 0o755, target=target)


def whiteout(path: str) -> Entry:
    """The OCI mark that removes `path` of the layers below."""
    parent, _, name = path.rpartition("/")
    return Entry(f"{parent}/.wh.{name}" if parent else f".wh.{name}")


def opaque(path: str) -> Entry:
    """The OCI mark that hides all that lower layers have in the directory `path`."""
    return Entry(f"{path}/.wh..wh..opq")


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """By path, hard links last: an extractor must have met their target."""
    return sorted(entries, key=lambda entry: (entry.kind == tarfile.LNKTYPE, entry.path))


@dataclass(frozen=True, slots=True)
class Layer:
    """A finished layer: its OCI descriptor and the digest of its tar stream."""

    descriptor: dict[str, Any]
    diff_id: str


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class _Verbatim:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _compressor(encoding: str) -> _Compressor:
    if encoding == "gzip":
        return zlib.compressobj(6, zlib.DEFLATED, 31)  # 31 = a gzip header, which zlib writes without time or name
    if encoding == "zstd":
        return zstandard.ZstdCompressor(level=3).compressobj()
    return _Verbatim()


class _Output:
    """One encoding of the stream on its way to a blob."""

    def __init__(self, blobs: Path, encoding: str) -> None:
        self._encoding, self._blobs = encoding, blobs
        self._compressor = _compressor(encoding)
        self._digest = hashlib.sha256()
        self._path = blobs / f"unfinished-{encoding}"
        self._file = self._path.open("wb")

    def write(self, data: bytes) -> None:
        self._put(self._compressor.compress(data))

    def _put(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def finish(self, diff_id: str) -> Layer:
        self._put(self._compressor.flush())
        size = self._file.tell()
        self._file.close()
        self._path.rename(self._blobs / self._digest.hexdigest())
        digest = f"sha256:{self._digest.hexdigest()}"
        return Layer({"mediaType": MEDIA_TYPES[self._encoding], "digest": digest, "size": size}, diff_id)


class _Tee(io.RawIOBase):
    """What tarfile writes to: the tar stream's own digest, and every encoding of it."""

    def __init__(self, outputs: Sequence[_Output]) -> None:
        self._outputs = outputs
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.digest.update(data)
        for output in self._outputs:
            output.write(data)
        return len(data)


def _header(entry: Entry) -> tarfile.TarInfo:
    info = tarfile.TarInfo(entry.path)
    info.type, info.mode, info.linkname = entry.kind, entry.mode, entry.target
    info.uid, info.gid, info.mtime = entry.uid, entry.gid, MTIME
    info.size = len(entry.data) if entry.kind == tarfile.REGTYPE else 0
    return info


def write_layer(blobs: Path, entries: Iterable[Entry], encodings: Sequence[str] = ("gzip",)) -> list[Layer]:
    """Write the entries, in their order, as one layer into the directory `blobs`; one result per encoding.

    A path that comes twice is written once, the first time: packages share directories. Memory stays bounded
    by the largest single file.
    """
    outputs = [_Output(blobs, encoding) for encoding in encodings]
    tee = _Tee(outputs)
    seen: set[str] = set()
    with tarfile.open(fileobj=tee, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 18) as archive:
        for entry in entries:
            if entry.path not in seen:
                seen.add(entry.path)
                archive.addfile(_header(entry), io.BytesIO(entry.data))
    diff_id = f"sha256:{tee.digest.hexdigest()}"
    return [output.finish(diff_id) for output in outputs]
