"""The detach keys, however they come in, and what is said of a log."""

from __future__ import annotations

import pytest
from wherry.cli.terminal import parse_keys
from wherry.flags import labels
from wherry.streaming import Keys
from wherry_shared.api.task import LOG_LABEL
from wherry_shared.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("ctrl-p,ctrl-q", b"\x10\x11"), ("a", b"a"), ("Ctrl-A,d", b"\x01d"), ("ctrl-@", b"\0"), ("ctrl-[", b"\x1b"),
        ("", b""),
    ],
)  # fmt: skip
def test_keys_as_docker_writes_them(text: str, keys: bytes) -> None:
    assert parse_keys(text) == keys


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-pp", "ab", ",", "alt-x", "ctrl-é", "é"])
def test_keys_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_keys(text)


def test_dockers_options_of_a_log() -> None:
    given = {"log_opt": ["max-size=10m", "max-file=3"]}
    assert labels(given) == {LOG_LABEL: "max_size=10485760&max_files=3"}
    for wrong in ("max-size=ten", "max-file=-1", "tag=x", "max-size"):
        with pytest.raises(InvalidArgument):
            labels({"log_opt": [wrong]})


def test_what_is_not_the_keys_is_passed_on() -> None:
    typed = b"ls\x10\x10x\x10"
    keys, passed = Keys(b"\x10\x11"), b""
    for byte in typed:
        data, done = keys.sift(bytes([byte]))
        passed += data
        assert not done
    assert (passed, keys.withheld) == (typed[:-1], b"\x10")
    assert keys.sift(b"\x11never") == (b"", True)
    assert Keys(b"\x10\x11").sift(b"before\x10\x11after") == (b"before", True)
    assert Keys(b"").sift(b"\x10\x11") == (b"\x10\x11", False)
