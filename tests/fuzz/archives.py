"""Archives to begin with, for all targets that read tar: every type, every kind of extension, and tries to get out."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterator

BLOCK = 512
TOKENS = (
    b"ustar\x0000", b"ustar  \0", b"tar\0", b".wh.", b".wh..wh..opq", b"../", b"/", b"\x80", b"\xff",
    b"11 path=a\n", b"14 linkpath=b\n", b"13 size=1024\n", b"20 mtime=1.000000001\n", b"10 uid=-1\n",
    b"25 SCHILY.xattr.user.a=b\n", b"22 GNU.sparse.major=1\n", b"22 GNU.sparse.minor=0\n",
    b"26 GNU.sparse.map=0,1,2,3\n", b"27 GNU.sparse.realsize=512\n", b"23 GNU.sparse.offset=0\n",
)  # fmt: skip


def summed(data: bytes) -> bytes:
    """The archive with right checksums in all that looks like a header: a guess never finds one."""
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    return b"".join(with_sum(b) if len(b) == BLOCK and b[257:262] == b"ustar" else b for b in blocks)


def with_sum(block: bytes) -> bytes:
    total = sum(block) - sum(block[148:156]) + 8 * 32
    return block[:148] + b"%06o\0 " % total + block[156:]


def header(name: bytes, kind: bytes = b"0", size: int = 0, link: bytes = b"") -> bytes:
    block = struct.pack(
        "100s8s8s8s12s12s8sc100s8s247s", name, b"0000644", b"0000000", b"0000000", b"%011o" % size, b"00000000001",
        b" " * 8, kind, link, b"ustar\x0000", b"",
    ).ljust(BLOCK, b"\0")  # fmt: skip
    return with_sum(block[:BLOCK])


def member(name: bytes, kind: bytes = b"0", body: bytes = b"", link: bytes = b"") -> bytes:
    return header(name, kind, len(body), link) + body + bytes(-len(body) % BLOCK)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    payload = b""
    for key, value in records:
        size = len(key) + len(value) + 3
        length = next(n for n in range(size, size + 9) if len(b"%d" % n) + size == n)
        payload += b"%d %b=%b\n" % (length, key, value)
    return member(b"pax", kind, payload)


def seeds() -> Iterator[bytes]:
    """Some dozen archives."""
    end = bytes(2 * BLOCK)
    for kind in b"01234567gxLKSVAX\0":
        yield member(b"name", bytes([kind]), b"", b"target") + end
    yield member(b"d/", b"5") + member(b"d/f", body=b"body") + member(b"d/l", b"1", link=b"d/f") + end
    yield member(b"s", b"2", link=b"/outside") + member(b"s/f", body=b"evil") + end
    yield member(b"s", b"2", link=b"../outside") + member(b"h", b"1", link=b"s/kept") + member(b"h", body=b"x") + end
    yield member(b"../../outside/f", body=b"evil") + member(b"/outside/g") + member(b".", b"2", link=b"/") + end
    yield member(b"d", b"5") + member(b"d", b"2", link=b"..") + member(b"d/outside/kept", body=b"x") + end
    yield member(b"a/.wh.b") + member(b"a/.wh..wh..opq") + member(b".wh..wh..opq") + member(b".wh...") + end
    yield member(b"c", b"3") + member(b"b", b"4") + member(b"p", b"6") + end
    yield pax((b"path", b"long/" * 30 + b"name"), (b"size", b"3")) + member(b"n", body=b"abc") + end
    yield pax((b"SCHILY.xattr.user.a", b"\0\1"), (b"mtime", b"-1.5")) + member(b"n") + end
    sparse = [(b"GNU.sparse.major", b"0"), (b"GNU.sparse.minor", b"1"), (b"GNU.sparse.map", b"0,2,8,2")]
    yield pax(*sparse, (b"GNU.sparse.size", b"16")) + member(b"n", body=b"abcd") + end
    body = b"2\n0\n2\n8\n2\n".ljust(BLOCK, b"\0") + b"abcd"
    real = (b"GNU.sparse.realsize", b"16")
    yield pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), real) + member(b"n", body=body) + end
    yield member(b"L", b"L", b"long-" * 40 + b"\0") + member(b"K", b"K", b"l" * 200 + b"\0") + member(b"n", b"2") + end
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        yield _by_tarfile(form)


def _by_tarfile(form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, kind in ((b"dir", tarfile.DIRTYPE), (b"dir/" + b"n" * 90 + b"/f", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name.decode())
            info.type, info.size, info.uid = kind, 4 if kind == tarfile.REGTYPE else 0, 1000
            tar.addfile(info, io.BytesIO(b"body"))
    return file.getvalue()[: 8 * BLOCK]
