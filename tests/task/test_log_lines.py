"""What a log makes of a stream: whole lines, and parts of those that stay unfinished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wherry_task.monitor import pump


class Log:
    """A stream on its way into a log, and the loop that it asks to be called again."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path, self._now = path, 100.0
        clock = SimpleNamespace(**{**vars(pump.time), "monotonic": lambda: self._now})
        monkeypatch.setattr(pump, "time", clock)
        self._loop: Any = SimpleNamespace(pending=list[Callable[[], bool]]())
        opened = path.open("ab")
        self._sink = pump.LogFile(opened.fileno(), str(path), 0, 1).sink(self._loop, "stdout")
        self._opened = opened

    def write(self, data: str, *, after: float = 0.0) -> None:
        """One round of the loop: what came, and the calls that are pending."""
        self._now += after
        if data:
            self._sink.write(data.encode())
        self._loop.pending = [call for call in self._loop.pending if not call()]

    @property
    def lines(self) -> list[str]:
        return [line.split(" ", 2)[2] for line in self._path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    return Log(tmp_path / "log", monkeypatch)


def test_a_busy_stream_is_cut_where_its_lines_end(log: Log) -> None:
    for number in range(50):
        log.write(f"{number}\nbegun ", after=0.019)
    log.write("", after=0.021)
    assert log.lines == ["F 0", *(f"F begun {number}" for number in range(1, 50)), "P begun "]


def test_what_stays_unfinished_is_there_in_parts(log: Log) -> None:
    log.write("50 %")
    log.write(" .", after=0.015)
    assert log.lines == []
    log.write(" .", after=0.006)  # it grows, and is no other line
    assert log.lines == ["P 50 % . ."]
    log.write(" done\nnext")
    assert log.lines == ["P 50 % . .", "F  done"]
    log.write("\n")
    log.write("", after=1.0)
    assert log.lines == ["P 50 % . .", "F  done", "F next"]
