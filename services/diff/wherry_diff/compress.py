"""The forms of a layer's archive: as it is, gzip, zstd. The same input gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import zstandard
from isal import isal_zlib
from wherry_shared.errors import Unimplemented

_OCI = "application/vnd.oci.image.layer.v1.tar"
_DOCKER = "application/vnd.docker.image.rootfs.diff.tar"
GZIP_LAYER = f"{_OCI}+gzip"
# isal's fastest but one: the ratio of zlib's level 1 to 2 at a multiple of its speed. zstd's own default.
_GZIP_LEVEL, _ZSTD_LEVEL = 1, 1
_GZIP_WRAPPER = 31  # zlib's window bits for a gzip header, whose time is 0


class Compressor(Protocol):
    """What takes pieces and gives pieces."""

    def compress(self, data: bytes) -> bytes: ...
    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _gzip() -> Compressor:
    made: Compressor = isal_zlib.compressobj(_GZIP_LEVEL, isal_zlib.DEFLATED, _GZIP_WRAPPER)
    return made


def _zstd() -> Compressor:
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()


_FORMS: dict[str, Callable[[], Compressor]] = {
    _OCI: _Plain, GZIP_LAYER: _gzip, f"{_OCI}+zstd": _zstd,
    _DOCKER: _Plain, f"{_DOCKER}.gzip": _gzip, f"{_DOCKER}.zstd": _zstd,
}  # fmt: skip


def compressor(media_type: str) -> Compressor:
    """What makes a layer of this media type. Unimplemented for any other."""
    if media_type not in _FORMS:
        raise Unimplemented(f"layers of the media type {media_type!r} cannot be made")
    return _FORMS[media_type]()


def is_plain(media_type: str) -> bool:
    """Whether a layer of this type is the archive itself."""
    return _FORMS.get(media_type) is _Plain
