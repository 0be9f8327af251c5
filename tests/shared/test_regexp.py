"""Go's regular expressions: the same answers as Python's engine where both agree, and never more than linear time."""

from __future__ import annotations

import logging
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from wherry_shared.errors import InvalidArgument, ResourceExhausted
from wherry_shared.regexp import REMEMBERED_MAX, Automaton, compile_regexp
from wherry_shared.regexp_syntax import parse


def _joined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(parts, min_size=1, max_size=4).map("".join),
        st.lists(parts, min_size=1, max_size=3).map(lambda p: f"(?:{'|'.join(p)})"),
        st.tuples(
            parts, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{0,}", "{,1}"])
        ).map(lambda t: f"(?:{t[0]}){t[1]}"),
    )  # fmt: skip


ATOMS = st.sampled_from(
    [
        "a",
        "b",
        "\n",
        ".",
        "[ab]",
        "[^a]",
        "[a-c_]",
        r"\w",
        r"\W",
        r"\b",
        r"\B",
        "^",
        r"\A",
        r"\.",
        "",
        "(?i:B)",
        "(?s:.)",
        "é",
    ]
)
PATTERNS = st.recursive(ATOMS, _joined, max_leaves=8)
TEXTS = st.text(st.sampled_from("abcAB_. \né"), max_size=8)


@settings(max_examples=400)
@given(PATTERNS, TEXTS)
def test_python_says_the_same(pattern: str, text: str) -> None:
    assume(text or r"\B" not in pattern)  # Python's \B alone does not hold in an empty text
    theirs = re.compile(pattern.replace("{,1}", r"\{,1\}"), re.ASCII)  # Go's braces without a first number are text
    assert compile_regexp(pattern)(text) == (theirs.search(text) is not None)


@settings(max_examples=100)
@given(PATTERNS, st.lists(TEXTS, min_size=2, max_size=6))
def test_what_is_remembered_of_one_text_does_not_change_the_next(pattern: str, texts: list[str]) -> None:
    tree = parse(pattern)
    used = Automaton(pattern, tree)
    assert [used.search(t) for t in texts] == [Automaton(pattern, tree).search(t) for t in texts]


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("", "", True),
        ("^$", "", True),
        ("^$", "a", False),
        ("a$", "a\n", False),
        (r"a\z", "ba", True),
        ("(?m)^b$", "a\nb\nc", True),
        ("^b$", "a\nb\nc", False),
        ("a.c", "a\nc", False),
        ("(?s)a.c", "a\nc", True),
        ("(?i)ReDiS", "REdis", True),
        ("(?i)[a-z]", "ß", False),
        ("(?i)[^a]", "A", False),
        ("a(?i)b", "AB", False),
        ("(a(?i)b)c", "aBC", False),
        ("(?i:a)b", "AB", False),
        ("(?i-s:a.)", "A\n", False),
        (r"\Qa.b*\E+", "a.b**", True),
        (r"\Qa.b", "axb", False),
        ("[[:alpha:]]+[[:digit:]]", "ab1", True),
        ("^[[:^alpha:]]+$", "12", True),
        ("[^[:^alpha:]1]", "12", False),
        ("[]a]", "]", True),
        ("[^]a]", "]a", False),
        ("[a-]", "-", True),
        (r"[\d\-x]", "-", True),
        (r"^\d+$", "٣", False),
        (r"^\w$", "é", False),
        (r"^\pL\p{Nd}\PL\p{^Lu}$", "é1-a", True),
        (r"\pL", "1", False),
        (r"\p{Any}", "\n", True),
        (r"\x41\x{1F600}\101\07", "A😀A\x07", True),
        (r"\a\f\t\n\r\v", "\a\f\t\n\r\v", True),
        (r"^x{2,3}$", "xxxx", False),
        (r"^x{2,3}$", "xxx", True),
        (r"^x{2,}$", "x" * 9, True),
        ("x{,2}", "x{,2}", True),
        ("x{a", "x{a", True),
        ("(?P<name>a)(?<other>b)", "ab", True),
        ("(?U)a+?", "a", True),
        ("()", "", True),
        ("(|a)+b", "aab", True),
        ("(((){1000}){1000}){1000}a", "a", True),
        ("^docker|^sandbox", "a-docker", False),
        ("^/tasks/|^/images/", "/images/create", True),
        (r"foo\b", "food foo", True),
        (r"foo\b", "food", False),
        (r"^\Bx", "x", False),
    ],
)
def test_go_says(pattern: str, text: str, found: bool) -> None:
    assert compile_regexp(pattern)(text) is found


@pytest.mark.parametrize(
    "pattern",
    [
        "(", ")", "a)", "(a", "[", "[a", "[z-a]", "[[:nope:]]", "*", "a**", "a*+", "|*", "(?=a)", "(?!a)", "(?<=a)",
        "(?P=n)", "(?x)a", r"\1", r"\8", r"\y", r"\C", r"\pX1", r"\p{", r"\p", "\\", r"[\b]", "x{2,1}", "x{1001}",
        "(?i)*",
        r"\xZZ", r"\x{110000}", r"[a-\d]",
    ],
)  # fmt: skip
def test_what_go_refuses_is_logged_and_matches_nothing(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "wherry.filters"):
        matches = compile_regexp(pattern)
    assert not any(matches(text) for text in ("", "a", pattern))
    assert "matches nothing" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a" * 1025, "longer"),
        ("(x{1000}){1000}", "larger"),
        ("(" * 100 + ")" * 100, "nested"),
        (r"\p{Greek}", "Greek"),
    ],
)
def test_what_is_too_much_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        compile_regexp(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*)(.*)(.*)(.*)(.*)x", "(a|aa)+$", "(a?){64}a{64}b"])
def test_what_python_would_never_finish_is_finished(pattern: str) -> None:
    assert compile_regexp(pattern)("a" * 4096 + "!") is False


def test_a_pattern_that_needs_too_many_states_is_given_up() -> None:
    text = "".join("ab"[(n * n // 7 + n // 3) % 2] for n in range(4096))
    with pytest.raises(ResourceExhausted, match="too long"):
        compile_regexp("(a|b)*a(a|b){500}c")(text)
    assert compile_regexp("(a|b)*a(a|b){8}$")(text) is (text[-9] == "a")


def test_many_characters_do_not_fill_the_memory() -> None:
    automaton = Automaton("x+y", parse("x+y"))
    for start in range(0, 0x10000, 1000):
        automaton.search("".join(chr(c) for c in range(start, start + 1000)))
    assert automaton._effort._remembered <= REMEMBERED_MAX
    assert sum(len(state.next) for state in automaton._states.values()) <= REMEMBERED_MAX // 8
