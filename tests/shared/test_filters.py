"""containerd's filter language: what parses, what matches, and what a wrong filter says."""

from __future__ import annotations

import logging
import tracemalloc
from contextlib import suppress
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wherry_shared.errors import InvalidArgument, ResourceExhausted, WherryError
from wherry_shared.filters import FieldPath, compile_filters, fields

REDIS = fields(
    {"name": "docker.io/library/redis:7", "target.digest": "sha256:abc", "kind": "active", "parent": ""},
    labels={
        "tier": "db", "containerd.io/gc.root": "2024", "a.b": "dotted", "empty": "", 'quo"te': "x,y z", "n": "1\n2",
    },
    annotations={"os": "linux"},
)  # fmt: skip


def found(*filters: str) -> bool:
    return compile_filters(filters)(REDIS)


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "name==docker.io/library/redis:7",
        "name!=other",
        "name~=redis",
        "name ~= ^docker",
        'name == "docker.io/library/redis:7"',
        "target.digest==sha256:abc",
        "labels.tier==db",
        'labels."tier"=="db"',
        'labels."containerd.io/gc.root"',
        'labels."containerd.io/gc.root"==2024',
        "labels.a.b==dotted",
        'labels."a.b"==dotted',
        "labels.a. b==dotted",
        "labels.empty",
        'labels.empty==""',
        r'labels."quo\"te"=="x,y z"',
        r'labels.n=="1\n2"',
        r'labels.n=="\x31\012\u0032"',
        r'labels.n~="^1\\n2$"',
        "annotations.os==linux",
        "labels.none!=x",
        "nothing!=x",
        "nothing~=^$",
        "parent!=x",
        "name~=|redis|",
        "name~=/redis/",
        r"name~=/library\/redis/",
        r"name~=|^docker\|^other|",
        "name~=^docker.io/.*:[0-9]+$",
        "name~=a|b",
        "name,kind==active",
        " name==docker.io/library/redis:7, kind==active,\tlabels.tier",
        "name~=|^docker|,kind==active",
        "kind==active,name~=x?",
        "",
    ],
)
def test_what_matches(text: str) -> None:
    assert found(text)


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "parent",
        "labels.none",
        "labels",
        "labels.a",
        "target",
        "name.more",
        "name==redis",
        "name!=docker.io/library/redis:7",
        "nothing==x",
        'nothing==""',
        'parent==""',
        "name~=^redis",
        "nothing~=x",
        "name,nothing",
        "kind==Active",
        r'name=="\xff"',
        "name~=(",
        "name~=|(|",
    ],
)
def test_what_does_not_match(text: str) -> None:
    assert not found(text)


def test_a_list_is_or_and_an_empty_one_is_everything() -> None:
    assert found()
    assert found("nothing", "name")
    assert found("nothing", "")
    assert not found("nothing", "labels.none")
    assert compile_filters([]).everything
    assert compile_filters(["name", ""]).everything
    assert not compile_filters(["name"]).everything


@pytest.mark.parametrize(
    ("text", "position"),
    [
        (" ", 1),
        (",", 0),
        ("name,", 5),
        ("name,,kind", 5),
        (".name", 0),
        ("name.", 5),
        ("name..x", 5),
        ("name=x", 4),
        ("name===x", 4),
        ("name<x", 4),
        ("name ", 5),
        ("name x", 5),
        ("name==", 6),
        ("name==,kind", 6),
        ("name==.x", 6),
        ("name== ==x", 7),
        ("name==x ", 7),
        ("name==x y", 7),
        ('name=="x', 6),
        ('name=="x"y', 9),
        ('name=="x\ny"', 6),
        (r'name=="\q"', 6),
        (r'name=="\x1"', 6),
        (r'name=="\400"', 6),
        (r'name=="\U00110000"', 6),
        (r'name=="\|"', 6),
        ("name==|x|", 6),
        ("name!=/x/", 6),
        ("name~=|x", 6),
        (r"name~=|\d|", 6),
        ("/name/==x", 0),
        ("labels.containerd.io/gc.root==x", 20),
        ("na\0me", 2),
        ("ünicode==x", 0),
    ],
)
def test_a_wrong_filter_names_the_position(text: str, position: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"position {position}: "):
        compile_filters(["name", text])


def test_filters_have_a_bound() -> None:
    with pytest.raises(InvalidArgument, match="longer"):
        compile_filters(["name==" + "x" * 40_000] * 2)
    for many in (["a==b"] * 1025, [",".join(["a==b"] * 1025)]):
        with pytest.raises(InvalidArgument, match="selectors"):
            compile_filters(many)


def test_patterns_have_bounds_together() -> None:
    """Each of them is small: all of them would take half a gigabyte, or a minute for each thing."""
    with pytest.raises(InvalidArgument, match="together"):
        compile_filters([f"a~=/[xy{n}]{{999}}/" for n in range(5)])
    matches = compile_filters([f"a~=/[xy]*[xy]{{90}}{n}/" for n in range(40)])
    with pytest.raises(ResourceExhausted, match="too long"):
        matches(fields({"a": "xy" * 2000}))
    assert not matches(fields({"a": "xy"})), "each thing is another"


def test_patterns_remember_little_together() -> None:
    tracemalloc.start()
    matches = compile_filters([f"a~=/[xy]*x[xy]{{{length}}}z/" for length in range(20, 55)])
    random = Random(1)
    for _ in range(10):
        with suppress(ResourceExhausted):
            matches(fields({"a": "".join(random.choices("xy", k=200))}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


def test_a_bad_pattern_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "wherry.filters"):
        assert not found("name~=(?=a)")
        assert found("name~=(?=a)", "name")
    assert "(?=a)" in caplog.text


def test_the_adaptor_sees_the_path_in_parts() -> None:
    seen: list[FieldPath] = []

    def adaptor(path: FieldPath) -> str | None:
        seen.append(path)
        return "x"

    assert compile_filters(['event."a.b".c==x,topic'])(adaptor)
    assert seen == [("event", "a.b", "c"), ("topic",)]


KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.text(st.sampled_from("abzAZ019:/@+*()[]~=!|\"\\'-_é€"), min_size=1, max_size=12).filter(
    lambda v: v[0] not in '=!~"|/'
)


def go_string(text: str) -> str:
    escapes = {'"': r"\"", "\\": r"\\", "\n": r"\n", "\0": r"\000", "\t": r"\x09", "é": r"\xc3\xa9", "€": r"\u20ac"}
    return '"' + "".join(escapes.get(c, c) for c in text) + '"'


@given(KEYS, KEYS, KEYS)
def test_what_is_quoted_is_meant_as_it_is(key: str, value: str, other: str) -> None:
    thing = fields({}, labels={key: value})
    selector = f"labels.{go_string(key)}=={go_string(value)}"
    assert compile_filters([selector])(thing)
    assert not compile_filters([f"labels.{go_string(key)} != {go_string(value)}"])(thing)
    assert compile_filters([selector])(fields({}, labels={key: other})) == (value == other)


@given(PLAIN, PLAIN)
def test_what_is_plain_is_meant_as_it_is(value: str, other: str) -> None:
    thing = fields({"name": value})
    assert compile_filters([f"name=={value}"])(thing)
    assert compile_filters([f"name!={other}, name"])(thing) == (value != other)


@given(st.text(st.sampled_from("aB7 ,=_-|/<>é"), max_size=6), st.sampled_from("|/"))
def test_an_alternate_quote_holds_a_pattern(value: str, quote: str) -> None:
    pattern = value.replace("|", "[|]").replace(quote, "\\" + quote)
    matcher = compile_filters([f"name~={quote}{pattern}{quote}"])
    assert matcher(fields({"name": f"<{value}>"}))
    assert matcher(fields({"name": "#"})) == (not value)


@given(st.text(st.sampled_from('ab.,=!~"|/\\ \n1x(*{')))
def test_any_text_is_a_filter_or_an_invalid_argument(text: str) -> None:
    try:
        compile_filters([text])(REDIS)
    except WherryError as e:
        assert isinstance(e, InvalidArgument)
        assert "position" in str(e) or "pattern" in str(e)
