"""The syntax of Go's regular expressions: from a pattern to a tree.

Greedy or not, captured or not: all the same to a filter, so the tree does not tell. Source: see regexp.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace

from .errors import InvalidArgument

REPEAT_MAX = 1000
DEPTH_MAX = 64

_REPEAT = re.compile(r"\{([0-9]{1,9})(,([0-9]{0,9}))?\}")
_GROUP = re.compile(r"\(\?(?:P?<([A-Za-z0-9_]+)>|([imsU]*(?:-[imsU]+)?)([:)]))")
_POSIX = re.compile(r"\[:(\^?)([a-z]+):\]")
_PROPERTY = re.compile(r"\^?([CLMNPSZ]|[A-Z][A-Za-z_]+)\Z")
_CONTROLS = {"a": "\a", "f": "\f", "t": "\t", "n": "\n", "r": "\r", "v": "\v"}
_LOOKS = {"A": "begin", "z": "end", "b": "boundary", "B": "no boundary"}
_WORD = (("0", "9"), ("A", "Z"), ("_", "_"), ("a", "z"))
_CLASSES: dict[str, tuple[tuple[str, str], ...]] = {
    "d": (("0", "9"),),
    "s": (("\t", "\n"), ("\f", "\r"), (" ", " ")),
    "w": _WORD,
    "alnum": (("0", "9"), ("A", "Z"), ("a", "z")),
    "alpha": (("A", "Z"), ("a", "z")),
    "ascii": (("\0", "\x7f"),),
    "blank": (("\t", "\t"), (" ", " ")),
    "cntrl": (("\0", "\x1f"), ("\x7f", "\x7f")),
    "digit": (("0", "9"),),
    "graph": (("!", "~"),),
    "lower": (("a", "z"),),
    "print": ((" ", "~"),),
    "punct": (("!", "/"), (":", "@"), ("[", "`"), ("{", "~")),
    "space": (("\t", "\r"), (" ", " ")),
    "upper": (("A", "Z"),),
    "word": _WORD,
    "xdigit": (("0", "9"), ("A", "F"), ("a", "f")),
}
_CATEGORY = re.compile(r"C[cfos]?|L[lmotu]?|M[cen]?|N[dlo]?|P[cdefios]?|S[ckmo]?|Z[lps]?")
_CHARACTERS = (
    (re.compile(r"\\x([0-9A-Fa-f]{2})"), 16),
    (re.compile(r"\\x\{([0-9A-Fa-f]+)\}"), 16),
    (re.compile(r"\\(0[0-7]{0,2}|[1-7][0-7]{1,2})"), 8),
)


class BadPattern(Exception):
    """Go's regexp package would not compile it either."""


def is_word(character: str) -> bool:
    """Whether it is `\\w`; the text's begin and end ("") are not."""
    return character.isascii() and (character.isalnum() or character == "_")


@dataclass(frozen=True, slots=True)
class Set:
    """The characters that may stand in one place. `literal`: the only one, when it is only one."""

    ranges: tuple[tuple[str, str], ...] = ()
    tests: tuple[Callable[[str], bool], ...] = ()
    negated: bool = False
    fold: bool = False
    literal: str = ""

    def has(self, character: str) -> bool:
        if self.literal:
            return character == self.literal
        hit = self._holds(character)
        if not hit and self.fold:
            hit = any(len(c) == 1 and self._holds(c) for c in (character.lower(), character.upper()))
        return hit != self.negated

    def _holds(self, character: str) -> bool:
        for first, last in self.ranges:
            if first <= character <= last:
                return True
        return any(test(character) for test in self.tests)


@dataclass(frozen=True, slots=True)
class Look:
    """A condition on the characters around: `begin`, `end`, `line begin`, `line end`, `boundary`, `no boundary`."""

    at: str


@dataclass(frozen=True, slots=True)
class Sequence:
    """One after the other."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alternatives:
    """One of them."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """The same again; `most` None is without end."""

    node: Node
    least: int
    most: int | None


Node = Set | Look | Sequence | Alternatives | Repeat


@dataclass(frozen=True, slots=True)
class _Flags:
    i: bool = False
    m: bool = False
    s: bool = False
    U: bool = False


def parse(pattern: str) -> Node:
    """The tree of a pattern. BadPattern, as Go's own error; InvalidArgument where Go knows more than we do."""
    parser = _Parser(pattern)
    tree = parser.alternatives(_Flags(), 0)
    if parser.at < len(pattern):
        raise BadPattern("unexpected )")
    return tree


class _Parser:
    """A pattern, read from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def alternatives(self, flags: _Flags, depth: int) -> Node:
        """Up to the closing parenthesis, or the end."""
        if depth > DEPTH_MAX:
            raise InvalidArgument(f"the pattern {self.text[:80]!r} is nested deeper than {DEPTH_MAX}")
        found: list[Node] = []
        parts: list[Node] = []
        repeatable = False
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] == "|":
                self.at += 1
                found.append(_sequence(parts))
                parts, repeatable = [], False
            elif (bounds := self._repeat()) is not None:
                if not repeatable:
                    raise BadPattern("missing argument to a repetition, or two in a row")
                parts.append(Repeat(parts.pop(), *bounds))
                repeatable = False
            elif (changed := self._set_flags(flags)) is not None:
                flags, repeatable = changed, False
            elif self.text.startswith("\\Q", self.at):
                quoted = self._quoted(flags)
                parts += quoted
                repeatable = bool(quoted)
            else:
                parts.append(self._atom(flags, depth))
                repeatable = True
        found.append(_sequence(parts))
        return found[0] if len(found) == 1 else Alternatives(tuple(found))

    def _repeat(self) -> tuple[int, int | None] | None:
        """The bounds of a repetition that stands here, with its `?`; braces that are none are text."""
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self.text[self.at])
        if simple is not None:
            self.at += 1
            self._take("?")
            return simple
        match = _REPEAT.match(self.text, self.at)
        if match is None:
            return None
        least = int(match[1])
        most = least if match[2] is None else int(match[3]) if match[3] else None
        if least > REPEAT_MAX or (most is not None and not least <= most <= REPEAT_MAX):
            raise BadPattern(f"invalid repeat count {match[0]}")
        self.at = match.end()
        self._take("?")
        return least, most

    def _set_flags(self, flags: _Flags) -> _Flags | None:
        """The flags from here on, when `(?i)` stands here."""
        match = _GROUP.match(self.text, self.at)
        if match is None or match[3] != ")":
            return None
        self.at = match.end()
        return _changed(flags, match[2])

    def _quoted(self, flags: _Flags) -> list[Node]:
        end = self.text.find("\\E", self.at)
        text = self.text[self.at + 2 :] if end < 0 else self.text[self.at + 2 : end]
        self.at = len(self.text) if end < 0 else end + 2
        return [_literal(character, flags) for character in text]

    def _atom(self, flags: _Flags, depth: int) -> Node:
        character = self.text[self.at]
        if character == "(":
            return self._group(flags, depth)
        if character == "[":
            return self._class(flags)
        if character == "\\":
            return self._escape(flags)
        self.at += 1
        if character == ".":
            return Set(negated=True) if flags.s else Set((("\n", "\n"),), negated=True)
        if character == "^":
            return Look("line begin" if flags.m else "begin")
        if character == "$":
            return Look("line end" if flags.m else "end")
        return _literal(character, flags)

    def _group(self, flags: _Flags, depth: int) -> Node:
        match = _GROUP.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
            flags = _changed(flags, match[2] or "")
        elif self.text.startswith("(?", self.at):
            raise BadPattern("unknown group: Go has neither look-around nor conditions")
        else:
            self.at += 1
        node = self.alternatives(flags, depth + 1)
        if not self._take(")"):
            raise BadPattern("missing )")
        return node

    def _escape(self, flags: _Flags) -> Node:
        name = self.text[self.at + 1 : self.at + 2]
        if name in _LOOKS:
            self.at += 2
            return Look(_LOOKS[name])
        return self._escaped_set(flags) or _literal(self._escaped_character(), flags)

    def _escaped_set(self, flags: _Flags) -> Set | None:
        """The set that `\\d`, `\\W`, `\\pL` or `\\P{Lu}` stands for, when one stands here."""
        name = self.text[self.at + 1 : self.at + 2]
        if name in ("p", "P"):
            return self._property(name == "P", flags)
        if not name or name not in "dswDSW":
            return None
        self.at += 2
        return Set(_CLASSES[name.lower()], negated=name.isupper())

    def _property(self, negated: bool, flags: _Flags) -> Set:
        rest = self.text[self.at + 2 :]
        name, length = (rest[1 : rest.find("}")], rest.find("}") + 1) if rest.startswith("{") else (rest[:1], 1)
        if length < 1 or not _PROPERTY.match(name):
            raise BadPattern("invalid character class after \\p")
        self.at += 2 + length
        if name.startswith("^"):
            negated, name = not negated, name[1:]
        if name == "Any":
            return Set(negated=not negated)
        if not _CATEGORY.fullmatch(name):
            raise InvalidArgument(
                f"the pattern {self.text[:80]!r}: \\p{{{name}}} is unknown, only categories are known"
            )
        return Set(tests=(lambda c: unicodedata.category(c).startswith(name),), negated=negated, fold=flags.i)

    def _escaped_character(self) -> str:
        """One character written with a backslash."""
        name = self.text[self.at + 1 : self.at + 2]
        if name in _CONTROLS:
            self.at += 2
            return _CONTROLS[name]
        for pattern, base in _CHARACTERS:
            match = pattern.match(self.text, self.at)
            if match is not None and int(match[1], base) <= 0x10FFFF:
                self.at = match.end()
                return chr(int(match[1], base))
        if not name or not name.isascii() or name.isalnum():
            raise BadPattern(f"invalid escape \\{name}")
        self.at += 2
        return name

    def _class(self, flags: _Flags) -> Set:
        """`[...]`"""
        self.at += 1
        negated = self._take("^")
        ranges: list[tuple[str, str]] = []
        sets: list[Set] = []
        first = True
        while first or self.text[self.at : self.at + 1] != "]":
            if self.at >= len(self.text):
                raise BadPattern("missing ]")
            first = False
            inner = self._posix() or (self._escaped_set(flags) if self.text[self.at] == "\\" else None)
            if inner is not None:
                sets.append(inner)
            else:
                ranges.append(self._range())
        self.at += 1
        return Set(tuple(ranges), tuple(s.has for s in sets), negated, flags.i)

    def _posix(self) -> Set | None:
        match = _POSIX.match(self.text, self.at)
        if match is None:
            return None
        if match[2] not in _CLASSES or len(match[2]) == 1:
            raise BadPattern(f"invalid character class {match[0]}")
        self.at = match.end()
        return Set(_CLASSES[match[2]], negated=bool(match[1]))

    def _range(self) -> tuple[str, str]:
        low = self._class_character()
        if self.text[self.at : self.at + 1] != "-" or self.text[self.at + 1 : self.at + 2] in ("]", ""):
            return low, low
        self.at += 1
        high = self._class_character()
        if high < low:
            raise BadPattern(f"invalid character range {low}-{high}")
        return low, high

    def _class_character(self) -> str:
        if self.text[self.at] == "\\":
            return self._escaped_character()
        self.at += 1
        return self.text[self.at - 1]

    def _take(self, character: str) -> bool:
        if self.text[self.at : self.at + 1] != character:
            return False
        self.at += 1
        return True


def _sequence(parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else Sequence(tuple(parts))


def _literal(character: str, flags: _Flags) -> Set:
    if flags.i and character.lower() != character.upper():
        return Set(((character, character), (character.lower(), character.lower())), fold=True)
    return Set(literal=character)


def _changed(flags: _Flags, letters: str) -> _Flags:
    """The flags after `i`, `s-m`, ..."""
    on, _, off = letters.partition("-")
    return replace(flags, **dict.fromkeys(on, True), **dict.fromkeys(off, False))
