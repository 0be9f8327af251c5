"""The detach keys, however they come in, what is said of a log, and output whose reader takes its time."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest
from wherry import streaming
from wherry.cli.terminal import parse_keys
from wherry.flags import labels
from wherry.stdio import Stdio
from wherry.streaming import Keys, Streaming
from wherry_shared.api.task import LOG_LABEL, Output
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


async def test_while_its_reader_takes_its_time_the_node_is_told_that_somebody_is_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who does not ask for ten seconds holds nothing back: what comes behind that would be lost."""
    data, asked = os.urandom(1 << 18), list[str]()

    async def output(container: str, exec_id: str, after: str, patience: float) -> Output:
        asked.append(after)
        return Output(stdout=data, next="behind") if after == "start" else Output(next="behind", ended=not patience < 1)

    monkeypatch.setattr(streaming, "WORD_SECONDS", 0.02)
    client: Any = SimpleNamespace(tasks=SimpleNamespace(output=output))
    reading, writing = os.pipe()
    streams = Streaming(client, "c", "", Stdio(None, writing, None))
    streams.begin()
    streams.started()
    draining = asyncio.ensure_future(streams.drained(0.05))
    while len(asked) < 4:
        await asyncio.sleep(0.01)
    assert asked == ["start", "behind", "behind", "behind"] and not draining.done()
    got = b""
    while len(got) < len(data):
        got += await asyncio.to_thread(os.read, reading, 1 << 16)
    await draining
    assert got == data
    streams.close()
    os.close(reading)
    os.close(writing)
