"""The regular expressions: any text is one, refused or matches nothing, in bounded time; and on what Go's and Python's
have in common, they say the same as Python's `re`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from wherry_shared.errors import InvalidArgument, ResourceExhausted
from wherry_shared.regexp import compile_regexp

from ..given import Given

logging.getLogger("wherry.filters").setLevel(logging.ERROR)
TOKENS = (
    b"(?:", b"(?i)", b"(?P<n>", b"[^a-c]", b"[[:alpha:]]", b"\\pL", b"\\p{Lu}", b"{2,3}", b"{1000}", b"*?", b"\\b",
    b"\\Q", b"\\E", b"\\x{10FFFF}", b"(a*)*", b"\\A", b"\\z", b"(?s).", b"(?m)^",
)  # fmt: skip
ALPHABET = "ab_ \nB1"
SIMPLE = ("a", "b", "_", " ", "\\n", "B", "1", ".", "\\d", "\\w", "\\s", "\\D", "\\W", "\\S", "[ab]", "[^a]", "[a-z1]")
LOOKS = {"^": "^", "\\A": "\\A", "$": "\\Z", "\\z": "\\Z", "\\b": "\\b", "\\B": "\\B"}
REPEATS = ("*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "+?", "??")


def seeds() -> Iterator[bytes]:
    for pattern in (b"^a(b|c)*$", b"(a*)*b", b"[[:alpha:]]+\\b", b"(?i)\\x41{2,5}", b"a{1000}", b"((((a?){9}){9}){9})"):
        yield b"\0" + pattern + b"\xffaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
    yield from (bytes([1]) + bytes((i * k) % 256 for i in range(40)) for k in range(1, 30, 3))


def one(data: bytes) -> None:
    given = Given(data)
    if not given.number(256):
        pattern, _, text = given.rest().partition(b"\xff")
        try:
            compile_regexp(pattern.decode("utf-8", "surrogateescape"))(text.decode("utf-8", "surrogateescape"))
        except (InvalidArgument, ResourceExhausted) as error:
            str(error)
    else:
        same(given)


def same(given: Given) -> None:
    ours, pythons = node(given, 3)
    search = compile_regexp(ours)
    expected = re.compile(pythons, re.ASCII)
    for _ in range(4):
        text = "".join(given.one_of(ALPHABET) for _ in range(given.number(8)))
        if not text and "\\B" in ours:
            continue  # Python's own: before 3.14 its \B does not hold in an empty text
        assert search(text) == bool(expected.search(text)), (ours, text)


def node(given: Given, depth: int) -> tuple[str, str]:
    """A pattern, as Go writes it and as Python does."""
    kind = given.number(8) if depth else given.number(3)
    if kind <= 1:
        part = given.one_of(SIMPLE)
        return part, part
    if kind == 2:
        look = given.one_of(tuple(LOOKS))
        return look, LOOKS[look]
    if kind in (3, 4):
        ours, pythons = node(given, depth - 1)
        repeat = given.one_of(REPEATS)
        return f"(?:{ours}){repeat}", f"(?:{pythons}){repeat}"
    left, right = node(given, depth - 1), node(given, depth - 1)
    if kind == 5:
        return f"({left[0]}|{right[0]})", f"({left[1]}|{right[1]})"
    return left[0] + right[0], left[1] + right[1]
