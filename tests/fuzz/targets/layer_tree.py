"""A layer extracted by the diff service: whatever it says, nothing beside its tree changes, and no descriptor stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from wherry_diff.apply import apply
from wherry_diff.extract import Target
from wherry_diff.limits import Limits
from wherry_shared.errors import DataLoss, InvalidArgument, PermissionDenied, ResourceExhausted

from .. import archives, room
from ..archives import member, summed

LIMITS = Limits(
    max_bytes=1 << 22, max_entries=200, max_name_bytes=1 << 15, max_header=1 << 13, max_ratio=50, ratio_after=1 << 20
)
TYPE = "application/vnd.oci.image.layer.v1.tar"
MAX_LEN = 8192
LOWER, OUTSIDE = room.ROOM / "lower", bytes(room.CANARY)
TOKENS = (*archives.TOKENS, b"outside/kept", b"low/f", b"lowlink", OUTSIDE, bytes(LOWER))
ALLOWED = (InvalidArgument, ResourceExhausted, PermissionDenied, DataLoss)


def seeds() -> Iterator[bytes]:
    for archive in archives.seeds():
        yield b"\0" + archive
        yield b"\1" + archive
    yield b"\1" + member(b"low/.wh.f") + member(b"low/x", b"1", link=b"low/g") + member(b"lowlink/n", body=b"new")
    yield b"\1" + member(b"low/d/deep/new") + member(b"low", b"2", link=OUTSIDE) + member(b"low/kept")


def one(data: bytes) -> None:
    room.clear()
    if not LOWER.exists():
        _lower()
    before, descriptors = room.state(), len(os.listdir("/proc/self/fd"))
    overlay = bool(data and data[0] & 1)
    target = Target(str(room.TREE), overlay=overlay, parents=(str(LOWER),) if overlay else ())
    with suppress(*ALLOWED):
        apply([summed(data[1:])], TYPE, target, LIMITS)
    assert room.state() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def _lower() -> None:
    """A parent, with links of its own to the canary."""
    (LOWER / "low/d").mkdir(parents=True)
    (LOWER / "low/f").write_bytes(b"lower")
    (LOWER / "low/g").symlink_to(room.CANARY / "kept")
    (LOWER / "lowlink").symlink_to("../outside")
