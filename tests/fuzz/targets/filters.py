"""Filters: any text is a filter or refused, and a filter that is written from its meaning means that."""

from __future__ import annotations

from collections.abc import Iterator

from wherry_shared.errors import InvalidArgument, ResourceExhausted
from wherry_shared.filters import compile_filters, fields

from ..given import Given

TOKENS = (b"==", b"!=", b"~=", b"labels.", b'"', b"|", b"/", b"\\x41", b"\\u0041", b"\\377", b",", b"^a$", b".*", b" ")
LABELS = {"a": "1", "b.c": "x y", "é": "", "q": 'quo"te', "d": "\U0001f600\n"}
NAMES = ("name", "labels.a", 'labels."b.c"', "labels.b.c", 'labels."é"', "labels.q", "labels.d", "none", "id")
VALUES = {"name": "busybox", "id": "", "size": "10"}
ADAPTOR = fields(VALUES, labels=LABELS)
MEANT = {
    "name": "busybox", "labels.a": "1", 'labels."b.c"': "x y", "labels.b.c": "x y", 'labels."é"': "", "none": None,
    "labels.q": 'quo"te', "labels.d": "\U0001f600\n", "id": None,
}  # fmt: skip


def seeds() -> Iterator[bytes]:
    for text in ("name==busybox", 'labels."b.c"=="x y",name~=|^bu|', "labels.a!=2", "name~=/(b|u)+x$/", "labels.a", ""):
        yield b"\0" + text.encode()
    yield from (bytes([1 + kind]) + bytes(range(kind, kind + 30)) for kind in range(9))


def one(data: bytes) -> None:
    given = Given(data)
    if not given.number(256):
        any_text(given.rest().decode("utf-8", "surrogateescape"))
    else:
        meant(given)


def any_text(text: str) -> None:
    try:
        compile_filters([text])(ADAPTOR)
    except (InvalidArgument, ResourceExhausted) as error:
        str(error)


def meant(given: Given) -> None:
    filters, expected = [], False
    for _ in range(1 + given.number(3)):
        selectors, all_hold = [], True
        for _ in range(1 + given.number(3)):
            text, holds = selector(given)
            selectors.append(text)
            all_hold = all_hold and holds
        filters.append(",".join(selectors))
        expected = expected or all_hold
    assert compile_filters(filters)(ADAPTOR) == expected, filters


def selector(given: Given) -> tuple[str, bool]:
    name = given.one_of(NAMES)
    has = MEANT[name]
    operator = given.one_of(("", "==", "!="))
    if not operator:
        return name, has is not None
    value = given.one_of(("1", "busybox", "x y", "", 'quo"te', "\U0001f600\n", given.text()))
    if operator == "==":
        return f"{name}=={quoted(value)}", has == value
    return f"{name} != {quoted(value)}", (has or "") != value


def quoted(value: str) -> str:
    """As Go's strconv.Quote would: only what cannot stand as it is, is escaped."""
    return '"' + "".join(f"\\U{ord(c):08x}" if c in '"\\\n\0' or not c.isprintable() else c for c in value) + '"'
