"""`make demo`, as a newcomer runs it: a real redis in a container, every event of its life, nothing left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import leftovers
import pytest

DEMO = Path(leftovers.__file__).with_name("demo.py")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    # a session of its own, as from another terminal; the demo's own bounds end it long before this one
    done = subprocess.run([sys.executable, DEMO], capture_output=True, text=True, timeout=240, start_new_session=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def said(lines: list[str], part: str) -> list[str]:
    return [line.partition("|")[2].strip() for line in lines if line.partition("|")[0].strip() == part]


@pytest.mark.timeout(300)
def test_redis_answers_from_inside_the_container(lines: list[str]) -> None:
    words = "\n".join(said(lines, "redis"))
    assert "SET" in words and "OK" in words
    assert "GET" in words


@pytest.mark.timeout(300)
def test_every_event_of_the_container_is_printed_in_its_order(lines: list[str]) -> None:
    events = said(lines, "event")
    expected = ["/containers/create", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    places = [next((n for n, line in enumerate(events) if topic in line), -1) for topic in expected]
    assert places == sorted(places) and places[0] >= 0, events


@pytest.mark.timeout(300)
def test_nothing_is_left(lines: list[str]) -> None:
    assert any(line.startswith("==> nothing is left: no process, no mount") for line in lines)
