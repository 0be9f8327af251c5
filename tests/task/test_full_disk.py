"""What the monitor does with output for which the disk has no room: it goes on, and the file says what is missing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from node import small_disk
from wherry_task.monitor import pump
from wherry_task.stdio.logwriter import Writer

FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT
LINES = [b"%0100d\n" % number for number in range(500)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "8M") as made:
        yield made


class Full:
    """The rest of a disk, taken while this is entered."""

    def __init__(self, disk: Path) -> None:
        self.filler = disk / "filler"

    def __enter__(self) -> None:
        with self.filler.open("wb", buffering=0) as file:
            # Down to single blocks, and twice: what was set aside for metadata comes free when it is written out.
            for size in (1 << 16, 1 << 12, 1 << 10, 1 << 12, 1 << 10):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass
                os.fsync(file.fileno())

    def __exit__(self, *exc: object) -> None:
        self.filler.unlink()
        os.sync()


@pytest.mark.parametrize("size", [0, 4000], ids=["one file", "rotated"])
def test_a_log(disk: Path, size: int) -> None:
    path = disk / "log"
    file = pump.LogFile(os.open(path, FLAGS, 0o600), str(path), size, 100)
    sink = file.sink(Writer(), "stdout")
    sink.write(b"first\n")
    with Full(disk):
        for line in LINES:
            sink.write(line)
    sink.write(b"last\n")
    sink.close()
    files = sorted(path.parent.glob("log*"), key=lambda each: int(each.suffix[1:] or 0), reverse=True)
    lines = [line.split(b" ", 3) for each in files for line in each.read_bytes().splitlines()]
    assert all(tag == b"F" and stream == b"stdout" for _, stream, tag, _ in lines)
    assert [time for time, *_ in lines] == sorted(time for time, *_ in lines)
    first, *kept, marker, last = [text for *_, text in lines]
    assert (first, last) == (b"first", b"last") and [text + b"\n" for text in kept] == LINES[: len(kept)]
    assert len(kept) < len(LINES) and marker == b"[%d bytes lost]" % (101 * (len(LINES) - len(kept)))


def test_a_plain_file(disk: Path) -> None:
    path = disk / "out"
    sink = pump.FileSink(os.open(path, FLAGS, 0o600))
    with Full(disk):
        for line in LINES:
            assert sink.write(line) == b""
    sink.write(b"last\n")
    sink.close()
    kept, _, rest = path.read_bytes().partition(b"[")
    assert b"".join(LINES).startswith(kept)
    assert rest == b"%d bytes lost]\nlast\n" % (101 * len(LINES) - len(kept))
