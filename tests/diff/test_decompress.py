"""gzip and zstd streams, whole and broken, and the bounds on what comes out of them."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator

import pytest
import zstandard
from wherry_diff.decompress import CHUNK, MEDIA_TYPES, decompress
from wherry_diff.limits import DEFAULT, Limits
from wherry_shared.errors import DataLoss, ResourceExhausted, Unavailable, Unimplemented, WherryError

from .layers import TAR

Compress = Callable[[bytes], bytes]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


def zstd_of_unknown_size(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj()
    return compressor.compress(data) + compressor.flush()


COMPRESSORS = [pytest.param(f, id=f.__name__) for f in (gzip.compress, zstd, zstd_of_unknown_size)]
DATA = b"".join(b"%d " % at for at in range(200_000)) + os.urandom(100_000)


def out(data: bytes, limits: Limits = DEFAULT, cut: int = 100_000) -> bytes:
    pieces = list(decompress((data[at : at + cut] for at in range(0, len(data), cut)), TAR, limits))
    assert all(0 < len(piece) <= CHUNK + 16 for piece in pieces)
    return b"".join(pieces)


@pytest.mark.parametrize("cut", [1, 1000, 1 << 30])
@pytest.mark.parametrize("compress", COMPRESSORS)
def test_streams_come_out_as_they_went_in(compress: Compress, cut: int) -> None:
    data = DATA if cut > 1 else DATA[-3000:]
    assert out(compress(data), cut=cut) == data


@pytest.mark.parametrize("compress", COMPRESSORS)
def test_several_members_or_frames_are_one_stream(compress: Compress) -> None:
    parts = [DATA[:5], b"", DATA[5:400_000], DATA[400_000:]]
    for cut in (7000, 1 << 30):
        assert out(b"".join(map(compress, parts)), cut=cut) == DATA
    assert out(compress(b"")) == b""


def test_a_file_is_read_too_and_not_closed() -> None:
    file = io.BytesIO(gzip.compress(DATA))
    assert b"".join(decompress(file, TAR, DEFAULT)) == DATA
    assert not file.closed


@pytest.mark.parametrize("data", [b"", b"a", b"\x1f\x8b", b"(\xb5", b"plain" * 1000])
def test_what_is_not_compressed_passes(data: bytes) -> None:
    assert out(data, cut=100_000) == data


@pytest.mark.parametrize("compress", COMPRESSORS)
def test_the_first_bytes_say_what_it_is(compress: Compress) -> None:
    packed = compress(DATA)
    for media_type in MEDIA_TYPES:
        assert b"".join(decompress([packed], media_type, DEFAULT)) == DATA
        assert b"".join(decompress([DATA], media_type, DEFAULT)) == DATA


def test_zstd_may_begin_with_a_frame_to_skip() -> None:
    skipped = (0x184D2A50).to_bytes(4, "little") + (10).to_bytes(4, "little") + b"0123456789"
    assert out(skipped + zstd(DATA)) == DATA
    with pytest.raises(DataLoss):
        out(zstd(DATA) + skipped[:-1])


@pytest.mark.parametrize(
    "media_type",
    ["", "text/plain", "application/vnd.oci.image.layer.v1.tar+lz4",
    "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
     "application/vnd.oci.image.config.v1+json"],
)  # fmt: skip
def test_other_media_types(media_type: str) -> None:
    with pytest.raises(Unimplemented):
        decompress([b""], media_type, DEFAULT)


@pytest.mark.parametrize("compress", COMPRESSORS)
def test_a_stream_that_is_cut_off_is_data_loss(compress: Compress) -> None:
    packed = compress(DATA)
    for keep in [4, 5, 9, 10, 11, 18, 100, len(packed) // 2, *range(len(packed) - 20, len(packed))]:
        with pytest.raises(DataLoss):
            out(packed[:keep])
        with pytest.raises(DataLoss):
            out(packed + packed[:keep])


@pytest.mark.parametrize("level", [0, 6])
def test_gzip_verifies_its_checksum_and_length(level: int) -> None:
    packed = gzip.compress(DATA, level)
    for at in (-8, -5, -4, -1):
        broken = bytearray(packed)
        broken[at] ^= 1
        with pytest.raises(DataLoss):
            out(bytes(broken))


@pytest.mark.parametrize("compress", COMPRESSORS)
def test_garbage_behind_the_stream_is_data_loss(compress: Compress) -> None:
    with pytest.raises(DataLoss):
        out(compress(DATA) + b"garbage")
    if compress is gzip.compress:
        assert out(compress(DATA) + bytes(5000), cut=300) == DATA


@pytest.mark.parametrize("compress", COMPRESSORS)
def test_flipped_bits_end_in_our_errors_or_not_at_all(compress: Compress) -> None:
    packed = compress(DATA[:30_000])
    for at in range(4, len(packed), 97):
        broken = bytearray(packed)
        broken[at] ^= 0x40
        with contextlib.suppress(WherryError):
            out(bytes(broken))


def test_bombs_are_stopped_by_their_ratio_and_by_their_size() -> None:
    block = zstandard.ZstdCompressor(level=3).compress(bytes(64 << 20))
    with pytest.raises(ResourceExhausted, match="grows more than 1000 times"):
        for _ in decompress([block] * 100, TAR, DEFAULT):
            pass
    deflate = zlib.compressobj(9, wbits=31)
    nested = b"".join(deflate.compress(bytes(1 << 20)) for _ in range(100)) + deflate.flush()
    with pytest.raises(ResourceExhausted, match="grows more than 500 times"):
        out(nested, Limits(max_ratio=500, ratio_after=1 << 20))
    with pytest.raises(ResourceExhausted, match="more than 1000000 bytes"):
        out(nested, Limits(max_bytes=1_000_000))
    with pytest.raises(ResourceExhausted, match="more than 1000 bytes"):
        out(bytes(1001), Limits(max_bytes=1000))
    assert len(out(nested, Limits(max_ratio=2000))) == 100 << 20


def test_a_bomb_does_not_fill_the_memory() -> None:
    """However much one piece of input unpacks to, it comes out in small pieces."""
    packer = zstandard.ZstdCompressor(level=19, write_content_size=False).compressobj()
    frame = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1 << 10)) + packer.flush()
    assert len(frame) < 200_000
    first = next(decompress([frame], TAR, Limits(ratio_after=1 << 40)))
    assert len(first) <= CHUNK


def test_a_window_beyond_reason_is_refused() -> None:
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x00, (31 - 10) << 3]) + b"\x01\x00\x00"
    with pytest.raises(ResourceExhausted, match="window"):
        out(frame)


def test_errors_of_the_source() -> None:
    def broken(error: Exception) -> Iterator[bytes]:
        yield gzip.compress(DATA)[:1000]
        raise error

    with pytest.raises(Unavailable, match="reset"):
        list(decompress(broken(ConnectionResetError("reset")), TAR, DEFAULT))
    with pytest.raises(KeyError):
        list(decompress(broken(KeyError("x")), TAR, DEFAULT))
