"""containerd's filter language: `labels.role==web,name~=|^docker|`.

    matches = compile_filters(filters)                       # InvalidArgument names the position
    matches(fields({"name": image.name}, labels=image.labels))

A list's elements are OR-ed, the selectors inside one are AND-ed; an empty list, or an empty element, matches all.

    selectors := selector ("," selector)*
    selector  := fieldpath [operator value]      without operator: the field is there
    fieldpath := field ("." field)*
    field     := [A-Za-z0-9_-]+ | a Go string in double quotes
    operator  := "==" | "!=" | "~="              ~= is an unanchored regular expression of Go's
    value     := text up to a comma or a space | a Go string in double quotes; after ~= also within | | or / /

Blanks may stand before a field, an operator and a value. `!=` and `~=` see an absent field as "", `==` never
matches one. Labels and annotations are one map each: `labels.a.b` is the label `a.b`, like `labels."a.b"`.
Source: containerd's `filters` package, tests/shared/test_filters.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from .errors import InvalidArgument
from .regexp import Effort, compile_regexp

FieldPath = tuple[str, ...]
Adaptor = Callable[[FieldPath], str | None]
"""What a thing's field holds: its text, or None when the thing has no such field (or an empty one)."""

TEXT_MAX = 64 * 1024
"""The most characters of all filters of one call together."""
SELECTORS_MAX = 1024
"""The most selectors of all of them."""

_Predicate = Callable[[Adaptor], bool]
_SPACES = re.compile("[\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*")
_FIELD = re.compile(r"[A-Za-z0-9_-]+")
_OPERATOR = re.compile(r"[=!~]+")
_ESCAPES = r"[abfnrtv\\%s]|[0-7]{3}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}"
_QUOTED = {
    q: re.compile(rf"{re.escape(q)}(?:[^{q}\\\n\0]|\\(?:{_ESCAPES % q}))*{re.escape(q)}") for q in '"|/'
}  # fmt: skip
_ESCAPE = re.compile(r"\\(U.{8}|u.{4}|x..|[0-7]{3}|.)", re.DOTALL)
_SIMPLE = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11}


class Matcher:
    """Whether any filter of a list matches a thing. `everything`: it needs no look at the thing."""

    __slots__ = ("_alternatives", "_effort", "everything")

    def __init__(self, alternatives: list[list[_Predicate]], effort: Effort) -> None:
        self.everything = not alternatives or not all(alternatives)
        self._alternatives = alternatives
        self._effort = effort

    def __call__(self, adaptor: Adaptor) -> bool:
        if self.everything:
            return True
        self._effort.work = 0
        for selectors in self._alternatives:
            for selector in selectors:
                if not selector(adaptor):
                    break
            else:
                return True
        return False


def compile_filters(filters: Sequence[str]) -> Matcher:
    """The matcher of a call's filters. InvalidArgument, naming the filter, the position (from 0) and the reason.

    Patterns that are no regular expression of Go's are logged and match nothing, as in containerd. Of those that are,
    the largest are refused (regexp.py), and a matcher may raise ResourceExhausted where one takes too long.
    """
    return _compile(tuple(filters))


@lru_cache(maxsize=64)
def _compile(filters: tuple[str, ...]) -> Matcher:
    if sum(map(len, filters)) > TEXT_MAX:
        raise InvalidArgument(f"the filters are longer than {TEXT_MAX} characters together")
    effort, found, count = Effort(), [], 0
    for text in filters:
        found.append(_Parser(text, effort).selectors() if text else [])
        count += max(1, len(found[-1]))
        if count > SELECTORS_MAX:
            raise InvalidArgument(f"the filters have more than {SELECTORS_MAX} selectors together")
    return Matcher(found, effort)


def fields(values: Mapping[str, str], **maps: Mapping[str, str]) -> Adaptor:
    """The adaptor of a thing with fields `values` ("target.digest" -> text; "" is absent) and maps such as `labels`."""

    def field(path: FieldPath) -> str | None:
        entries = maps.get(path[0])
        if entries is not None:
            return entries.get(".".join(path[1:]))
        return values.get(".".join(path)) or None

    return field


class _Parser:
    """One filter, read from left to right."""

    def __init__(self, text: str, effort: Effort) -> None:
        self._text = text
        self._at = 0
        self._effort = effort

    def selectors(self) -> list[_Predicate]:
        found = [self._selector()]
        while self._at < len(self._text):
            if self._text[self._at] != ",":
                raise self._wrong("expected a comma or the end")
            self._at += 1
            found.append(self._selector())
        return found

    def _selector(self) -> _Predicate:
        path = [self._field()]
        while self._text[self._at : self._at + 1] == ".":
            self._at += 1
            path.append(self._field())
        if self._at == len(self._text) or self._text[self._at] == ",":
            return _present(tuple(path))
        operator = self._operator()
        value = self._value(alternates=operator == "~=")
        if operator == "~=":
            return _matches(tuple(path), compile_regexp(value, self._effort))
        return _COMPARISONS[operator](tuple(path), value)

    def _field(self) -> str:
        self._skip_spaces()
        if self._text[self._at : self._at + 1] in ('"', "|", "/"):
            return self._quoted(alternates=False)
        match = _FIELD.match(self._text, self._at)
        if match is None:
            raise self._wrong("expected a field")
        self._at = match.end()
        return match[0]

    def _operator(self) -> str:
        self._skip_spaces()
        match = _OPERATOR.match(self._text, self._at)
        if match is None or match[0] not in (*_COMPARISONS, "~="):
            raise self._wrong("expected an operator (==, != or ~=)")
        self._at = match.end()
        return match[0]

    def _value(self, *, alternates: bool) -> str:
        self._skip_spaces()
        text, start = self._text, self._at
        first = text[start : start + 1]
        if first in ('"', "|", "/"):
            return self._quoted(alternates=alternates)
        if not first or first in ".,=!~\0":
            raise self._wrong("expected a value")
        end = start + 1
        while end < len(text) and text[end] not in ", " and text[end].isprintable():
            end += 1
        self._at = end
        return text[start:end]

    def _quoted(self, *, alternates: bool) -> str:
        quote = self._text[self._at]
        if quote != '"' and not alternates:
            raise self._wrong(f"{quote} quotes only the pattern of ~=")
        match = _QUOTED[quote].match(self._text, self._at)
        if match is None:
            raise self._wrong("the quote does not end, or has an escape that Go does not know")
        text = match[0][1:-1]
        if "\\" in text:
            text = self._unescape(text)
        self._at = match.end()
        return text

    def _unescape(self, text: str) -> str:
        """Go's escapes; `\\x` and octal ones are bytes, which need not form valid text (such text matches nothing)."""
        parts: list[bytes] = []
        at = 0
        for match in _ESCAPE.finditer(text):
            parts.append(text[at : match.start()].encode("utf-8", "replace"))
            parts.append(self._escape(match[1]))
            at = match.end()
        parts.append(text[at:].encode("utf-8", "replace"))
        return b"".join(parts).decode("utf-8", "surrogateescape")

    def _escape(self, name: str) -> bytes:
        kind = name[0]
        if kind in "01234567x":
            code = int(name[1:], 16) if kind == "x" else int(name, 8)
            if code > 255:
                raise self._wrong(f"\\{name} is no byte")
            return bytes((code,))
        if kind in "uU":
            code = int(name[1:], 16)
            if code > 0x10FFFF:
                raise self._wrong(f"\\{name} is no Unicode character")
            return (chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd").encode()
        return bytes((_SIMPLE[kind],)) if kind in _SIMPLE else kind.encode()

    def _skip_spaces(self) -> None:
        match = _SPACES.match(self._text, self._at)
        if match is not None:
            self._at = match.end()

    def _wrong(self, reason: str) -> InvalidArgument:
        return InvalidArgument(f"filter {self._text[:200]!r}, position {self._at}: {reason}")


def _present(path: FieldPath) -> _Predicate:
    return lambda adaptor: adaptor(path) is not None


def _equal(path: FieldPath, value: str) -> _Predicate:
    return lambda adaptor: adaptor(path) == value


def _differs(path: FieldPath, value: str) -> _Predicate:
    return lambda adaptor: (adaptor(path) or "") != value


def _matches(path: FieldPath, search: Callable[[str], bool]) -> _Predicate:
    return lambda adaptor: search(adaptor(path) or "")


_COMPARISONS: dict[str, Callable[[FieldPath, str], _Predicate]] = {"==": _equal, "!=": _differs}
