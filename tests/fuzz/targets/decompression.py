"""gzip and zstd, as the diff service and the client read them: what both accept is the same bytes."""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import zstandard
from wherry import compression
from wherry_diff.decompress import decompress
from wherry_diff.limits import Limits
from wherry_shared.errors import DataLoss, ResourceExhausted

from ..given import Given

LIMITS = Limits(max_bytes=8 << 20, max_ratio=100, ratio_after=1 << 20)
TYPE = "application/vnd.oci.image.layer.v1.tar"
TOKENS = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18", bytes(16))


def seeds() -> Iterator[bytes]:
    text = b"a layer's bytes " * 40
    squeezed, frame = gzip.compress(text, mtime=0), zstandard.ZstdCompressor(write_checksum=True).compress(text)
    for body in (text, squeezed, squeezed * 2, squeezed + bytes(20), frame, frame * 2, squeezed[:-3], frame[:-3]):
        yield b"\0" + body
        yield b"\x07" + body
    yield b"\0" + gzip.compress(bytes(4 << 20), 9, mtime=0)[:4000]
    yield b"\0" + zstandard.ZstdCompressor().compress(bytes(16 << 20))


def one(data: bytes) -> None:
    given = Given(data)
    size = 1 + given.number(256)
    body = given.rest()
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    try:
        service = b"".join(decompress(chunks, TYPE, LIMITS))
    except (DataLoss, ResourceExhausted) as error:
        service = error
    parts = []
    try:
        for part in compression.decompress(iter(chunks), "it"):
            parts.append(part)
            assert len(part) <= max(compression.PIECE, size)
            if sum(map(len, parts)) > LIMITS.max_bytes:
                return
    except (DataLoss, ResourceExhausted):
        return  # zlib minds bits in the header that the service and Go do not
    if not isinstance(service, Exception):
        assert b"".join(parts) == service
