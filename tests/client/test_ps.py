"""Which containers `ps --filter` means."""

from __future__ import annotations

import pytest
from wherry.cli.ps import _check_states, _fits, _named, made_of
from wherry_shared.errors import InvalidArgument


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        ("docker.io/library/redis:7", "redis"), ("docker.io/library/redis:7", "redis:7"),
        ("docker.io/library/redis:7", "library/redis"), ("docker.io/library/redis:7", "docker.io/redis:7"),
        ("docker.io/library/redis:latest", "redis:latest"), ("docker.io/bitnami/redis:7", "bitnami/redis"),
        ("127.0.0.1:5000/library/redis:7", "127.0.0.1:5000/library/redis:7"), ("127.0.0.1:5000/a/redis:7", "redis:7"),
        ("sha256-of-what", "sha256-of-what"),
    ],
)  # fmt: skip
def test_an_ancestor(image: str, wanted: str) -> None:
    assert made_of(image, wanted)


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        # Whoever removes what `ps -q --filter ancestor=redis` names removes nothing else.
        ("docker.io/library/my-redis:7", "redis"), ("docker.io/library/redis:7", "redis:8"),
        ("docker.io/library/redis:7", "edis"), ("docker.io/library/redis:7", "y/redis"), ("", "redis"),
        ("docker.io/library/redis:7", "redis@sha256:" + "0" * 64), ("docker.io/library/redis:7", ""),
    ],
)  # fmt: skip
def test_none(image: str, wanted: str) -> None:
    assert not made_of(image, wanted)


def test_states_in_dockers_words_and_ours() -> None:
    """What was made and not started has no task."""
    row = {"state": "none", "labels": {}}
    assert _fits(row, {"status": ["created"]}) and _fits(row, {"status": ["running", "none"]})
    assert not _fits(row, {"status": ["exited"]}) and _fits({**row, "state": "stopped"}, {"status": ["exited"]})
    with pytest.raises(InvalidArgument, match="runing"):
        _check_states(["running", "runing"])


def test_a_name_is_a_regular_expression_as_dockers() -> None:
    for pattern in ("web", "^web", "^/web-1$", "eb-[0-9]$", ""):
        assert _named(pattern)("web-1"), pattern
    for pattern in ("^eb", "^/web$", "web-2"):
        assert not _named(pattern)("web-1"), pattern
    with pytest.raises(InvalidArgument, match="no regular expression"):
        _named("[")
