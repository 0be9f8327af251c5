"""What the collector reads: labels, times and durations of anybody, and the pages that services send each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC

from wherry_shared import references
from wherry_shared.references import Node, Page, expires_at, parse_duration, parse_time

from ..given import words

TOKENS = (
    b"\xff", b"containerd.io/gc.ref.content", b"containerd.io/gc.ref.snapshot.overlay/", b"containerd.io/gc.bref.image",
    b"containerd.io/gc.root", b"containerd.io/gc.expire", b"containerd.io/gc.flat", b"containerd.io/gc.cond.snapshot.",
    b"containerd.io/gc.cond.value-usedat", b"usedat<=", b"1h30m", b"-1.5s", b"300ms", b"2006-01-02T15:04:05.999Z",
    b"+23:59", b"|",
)  # fmt: skip


def seeds() -> Iterator[bytes]:
    yield b"containerd.io/gc.ref.content.l.0\xffsha256:" + b"a" * 64 + b"\xffcontainerd.io/gc.root\xffx"
    yield b"containerd.io/gc.ref.snapshot.overlay/x\xffk\xffcontainerd.io/gc.bref.container.c\xffid"
    yield b"containerd.io/gc.cond.snapshot.overlay\xffusedat>=1h,usedat<2m|key\xff2006-01-02T15:04:05Z\xff1.5h"
    yield b"containerd.io/gc.expire\xff9999-12-31T23:59:59-23:59\xff0001-01-01T00:00:00+23:59\xff-0"
    yield b"1" * 90 + b"\xff" + b"1h" * 40 + b"\xff" + b"." * 90


def one(data: bytes) -> None:
    texts = [part.decode("utf-8", "replace") for part in words(data)]
    for text in texts:
        at = parse_time(text)
        assert at is None or at.tzinfo is UTC
        seconds = parse_duration(text)
        assert seconds is None or not math.isnan(seconds)
    labels = dict(zip(texts[::2], texts[1::2], strict=False))
    expires_at(labels)
    node = Node("content", "default", "key", until=1.5, hard=[("content", "parent")])
    node.refer(labels, rootable=True)
    gone, bare = Node("images", "default", "gone", gone=True), Node("images", "default", "bare")
    page = Page()
    for each in (node, gone, bare):
        page.add(each)
    head, groups = references.decode(page.encode("head"))
    assert head == "head" and list(references.nodes(groups)) == [node, gone, bare]
