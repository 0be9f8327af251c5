"""Turns a compressed layer into the bytes of its archive: tar as it is, gzip (any number of members), zstd (of frames).

What the stream is, its first bytes say, whatever the media type claims: registries hold both kinds of mistakes, and
containerd looks inside too. The media type only has to be a layer's.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from typing import BinaryIO, cast

import zstandard
from isal import igzip_lib
from wherry_shared.errors import DataLoss, ResourceExhausted, Unavailable, Unimplemented

from .limits import Limits

CHUNK = 256 << 10  # a multiple of 512, so that headers seldom straddle; small enough for the cache between two threads
_GZIP_MAGIC = b"\x1f\x8b\x08"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_ZSTD_WINDOW = 128 << 20  # what the zstd tool accepts without being asked for more
_IsalError = cast(type[Exception], igzip_lib.IsalError)  # its stub declares a variable

_OCI = "application/vnd.oci.image.layer."
_DOCKER = "application/vnd.docker.image.rootfs."
MEDIA_TYPES = frozenset(
    [f"{_OCI}{kind}v1.tar{suffix}" for kind in ("", "nondistributable.") for suffix in ("", "+gzip", "+zstd")]
    + [f"{_DOCKER}{kind}diff.tar{suffix}" for kind in ("", "foreign.") for suffix in ("", ".gzip", ".zstd")]
)


def decompress(source: BinaryIO | Iterable[bytes], media_type: str, limits: Limits) -> Iterator[bytes]:
    """The uncompressed stream, in pieces of at most 256 KiB if it was compressed.

    Raises `Unimplemented` for a media type that is no layer's, at the first step `DataLoss` for streams that are cut
    off or corrupt, `ResourceExhausted` beyond `max_bytes` and `max_ratio`. What the source raises passes through.
    """
    if media_type not in MEDIA_TYPES:
        raise Unimplemented(f"layers of the media type {media_type!r} cannot be applied")
    return _bounded(_Input(source), limits)


class _Input:
    """The compressed bytes, counted."""

    def __init__(self, source: BinaryIO | Iterable[bytes]) -> None:
        read = getattr(source, "read", None)
        self._chunks: Iterator[bytes] = iter(lambda: read(CHUNK), b"") if read else iter(source)
        self._ready: list[bytes] = []
        self.size = 0

    def peek(self, size: int) -> bytes:
        """The first bytes, `size` of them or more unless the stream is shorter; they are not consumed."""
        head = b""
        while len(head) < size and (chunk := self.read()):
            head += chunk
        self._ready = [head] if head else []
        self.size -= len(head)
        return head

    def read(self, _size: int = -1) -> bytes:
        """Any number of bytes, none at the end."""
        chunk = self._ready.pop() if self._ready else b""
        while not chunk:
            try:
                chunk = next(self._chunks)
            except StopIteration:
                return b""
            except OSError as error:
                raise Unavailable(f"the layer cannot be read: {error.strerror or error}") from error
        self.size += len(chunk)
        return chunk


def _bounded(source: _Input, limits: Limits) -> Iterator[bytes]:
    head = source.peek(4)
    if head.startswith(_GZIP_MAGIC):
        pieces = _gunzip(source)
    elif head.startswith(_ZSTD_MAGIC) or int.from_bytes(head[:4], "little") in _ZSTD_SKIPPABLE:
        pieces = _unzstd(source)
    else:
        pieces = iter(source.read, b"")
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limits.max_bytes:
            raise ResourceExhausted(f"the layer has more than {limits.max_bytes} bytes uncompressed")
        if size > limits.ratio_after and size > limits.max_ratio * source.size:
            raise ResourceExhausted(f"the layer grows more than {limits.max_ratio} times when it is decompressed")
        yield piece


def _gunzip(source: _Input) -> Iterator[bytes]:
    """Members one after another (RFC 1952, 2.2); zeros that pad the file behind the last one are no error."""
    data = source.read()
    while data:
        member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        while not member.eof:
            if member.needs_input and not data:
                data = source.read()
                if not data:
                    raise DataLoss("the gzip stream ends too early")
            try:
                piece = member.decompress(data, max_length=CHUNK)
            except _IsalError as error:
                raise DataLoss(f"the gzip stream is corrupt: {error}") from error
            data = b""
            if piece:
                yield piece
        data = member.unused_data.lstrip(b"\0")
        while not data and (more := source.read()):
            data = more.lstrip(b"\0")


def _unzstd(source: _Input) -> Iterator[bytes]:
    """Frames one after another (RFC 8878, 3.1).

    The library keeps quiet about a frame that is cut off. So the source gets one frame more, of random bytes and with a
    checksum behind them: only between whole frames is it read as a frame, and then its contents end the output.
    """
    mark = secrets.token_bytes(16)
    last = zstandard.ZstdCompressor(write_checksum=True).compress(mark)
    frames = cast(BinaryIO, _Chain(source, last))
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    try:
        with decompressor.stream_reader(frames, read_size=CHUNK, read_across_frames=True) as reader:
            held = b""
            while piece := reader.read(CHUNK):
                if len(piece) < len(mark):
                    held += piece
                    continue
                if held:
                    yield held
                held = piece
    except zstandard.ZstdError as error:
        if "memory" in str(error):
            raise ResourceExhausted(f"the zstd stream wants a window above {_ZSTD_WINDOW >> 20} MiB") from error
        raise DataLoss(f"the zstd stream is corrupt: {error}") from error
    if not held.endswith(mark):
        raise DataLoss("the zstd stream ends too early")
    if len(held) > len(mark):
        yield held[: -len(mark)]


class _Chain:
    """A source with one thing more behind its end."""

    def __init__(self, source: _Input, last: bytes) -> None:
        self._source = source
        self._last = last

    def read(self, size: int = -1) -> bytes:
        chunk = self._source.read(size)
        if not chunk:
            chunk, self._last = self._last, b""
        return chunk
