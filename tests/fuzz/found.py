"""What fuzzing has found: one input a bug, run on every test run. `OPEN`: not mended yet, and what is wrong."""

from __future__ import annotations

from .archives import BLOCK, member, pax

FOUND: tuple[tuple[str, str, bytes], ...] = (
    ("bus_frames", "a frame of headers without sizes", b"\x01H0 503\r\nMSG a 1 1\r\nx\r\n"),
    ("references", "a path of the default registry that begins with library", b"library/oio/a\n"[:-1]),
    ("references", "a path of the default registry that begins with its name", b"docker.io/docker.io/library/redis:7"),
    (
        "tar_reader", "a sparse file of format 0 without a map",
        pax((b"GNU.sparse.major", b"0"), (b"GNU.sparse.minor", b"1")) + member(b"n", body=b"a") + bytes(2 * BLOCK),
    ),
    ("gc_labels", "durations of many digits and no unit, which took seconds each", (b"1" * 4000 + b"\xff") * 400),
    (
        "docker_config", "a name that is no text, which failed as it was sent",
        b'{"auths": {"r.example": {"username": "a\\ud800", "password": "b"}}}',
    ),
)  # fmt: skip
OPEN: dict[str, str] = {}
