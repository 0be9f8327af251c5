"""A log across its rotations: `log` is the newest file, `log.1` the one before, and so on.

Each line is `TIME STREAM P|F TEXT` with TIME as `2006-01-02T15:04:05.000000000Z`: always 30 characters, so that times
compare as text. A file is known by the time of its first line, whatever it is called by now; a place in a log is that
time and an offset.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from wherry_shared.errors import InvalidArgument

WINDOW = 512 << 10
TIME_LENGTH = 30
# A line holds up to 16 KiB of text.
_STEP = 64 << 10
_TURN = 1024  # lines that are looked at before others have their turn


@dataclass(frozen=True)
class Place:
    """Behind how many bytes of which file; file "": before the first line that there will be."""

    file: str = ""
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.file}@{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Place:
        """InvalidArgument: it is none."""
        file, separator, offset = text.partition("@")
        if not separator or not offset.isdecimal() or len(offset) > 19 or len(file) not in (0, TIME_LENGTH):
            raise InvalidArgument(f"{text[:80]!r} is no place in this log")
        return cls(file, int(offset))


@dataclass
class _File:
    fd: int
    first: str
    size: int


class Log:
    """A log as it is at one moment: its files, oldest first, each open."""

    def __init__(self, files: list[_File]) -> None:
        self._files = files

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Log]:
        """Whatever is there of the log at `path`."""
        files = _open_all(path)
        try:
            yield cls(files)
        finally:
            for file in files:
                os.close(file.fd)

    def beginning(self) -> Place:
        """Before its oldest line."""
        return Place(self._files[0].first) if self._files else Place()

    def end(self) -> Place:
        """Behind its newest whole line."""
        if not self._files:
            return Place()
        last = self._files[-1]
        return Place(last.first, _line_before(last, last.size))

    def read(self, after: Place) -> tuple[bytes, Place, bool]:
        """Whole lines behind a place, up to 512 KiB; the place behind them; whether lines in between are lost."""
        index, offset, gap = 0, 0, False
        if after.file:
            found = [i for i, file in enumerate(self._files) if file.first == after.file]
            gap = not found and bool(self._files)
            index, offset = (found[0], after.offset) if found else (0, 0)
        for i in range(index, len(self._files)):
            file = self._files[i]
            start = offset if i == index else 0
            data = os.pread(file.fd, min(WINDOW, max(0, file.size - start)), start)
            whole = data[: data.rfind(b"\n") + 1]
            if not whole and len(data) == WINDOW:
                whole = data  # no line of ours is that long: pass it on, rather than stand still
            if whole:
                return whole, Place(file.first, start + len(whole)), gap
            if not data and i + 1 < len(self._files):
                continue
            if i + 1 == len(self._files):
                return b"", Place(file.first, start) if file.first else after, gap
        return b"", after, gap

    def since(self, time: str) -> Place:
        """Before the first line of that time or later."""
        for i, file in enumerate(self._files):
            if i + 1 < len(self._files) and self._files[i + 1].first < time:
                continue
            offset = _first_at(file, time)
            if offset < file.size or i + 1 == len(self._files):
                return Place(file.first, offset)
        return self.beginning()

    def tail(self, lines: int) -> Generator[None, None, Place]:
        """Before the last so many lines; parts of one line count once. Yields now and then: a log may have millions."""
        left = lines
        if left <= 0:
            return self.end()
        for i, file in enumerate(reversed(self._files)):
            begin, left = yield from _last(file, left, open_line=i == 0)
            if not left:
                return Place(file.first, begin)
        return self.beginning()


def _open_all(path: Path) -> list[_File]:
    """From the newest on: a rotation meanwhile shows a file twice, and hides none."""
    found: dict[int, _File] = {}
    number = 0
    while True:
        try:
            fd = os.open(f"{path}.{number}" if number else path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            if number:
                break
            number += 1
            continue  # between a rotation's two steps the newest has no name
        status = os.fstat(fd)
        first = os.pread(fd, TIME_LENGTH, 0)
        if status.st_ino in found or len(first) < TIME_LENGTH:
            os.close(fd)
        else:
            found[status.st_ino] = _File(fd, first.decode("latin-1"), status.st_size)
        number += 1
    return list(reversed(found.values()))


def _line_before(file: _File, offset: int) -> int:
    """Where the last whole line before an offset ends."""
    while offset > 0:
        start = max(0, offset - _STEP)
        data = os.pread(file.fd, offset - start, start)
        end = data.rfind(b"\n")
        if end >= 0:
            return start + end + 1
        offset = start
    return 0


def _first_at(file: _File, time: str) -> int:
    """The offset of the first line that is not older than a time; the file's size when all are. By halves."""
    low, high = 0, file.size
    while high - low > _STEP:
        middle = (low + high) // 2
        data = os.pread(file.fd, _STEP, middle)
        begin = data.find(b"\n") + 1
        if not begin or len(data) < begin + TIME_LENGTH:
            break
        if data[begin : begin + TIME_LENGTH].decode("latin-1") < time:
            low = middle + begin
        else:
            high = middle
    while low < file.size:
        data = os.pread(file.fd, 2 * _STEP, low)
        offset = 0
        while (end := data.find(b"\n", offset)) >= 0:
            if data[offset : offset + TIME_LENGTH].decode("latin-1") >= time:
                return low + offset
            offset = end + 1
        if not offset:
            break
        low += offset
    return file.size


def _last(file: _File, lines: int, *, open_line: bool) -> Generator[None, None, tuple[int, int]]:
    """Where the last `lines` lines begin, and how many are missing. open_line: parts at the end are a line, too."""
    begin = _line_before(file, file.size)
    for count, (offset, line) in enumerate(_backwards(file, begin)):
        if count % _TURN == _TURN - 1:
            yield
        if open_line or _is_full(line):
            if not lines:
                return begin, 0
            lines -= 1
        open_line, begin = False, offset
    return begin, lines


def _backwards(file: _File, position: int) -> Iterator[tuple[int, bytes]]:
    """The lines before a line's beginning, the last first, with their offsets."""
    rest = b""
    while position > 0:
        start = max(0, position - _STEP)
        data = os.pread(file.fd, position - start, start) + rest
        offset, lines = start + len(data), data.split(b"\n")[:-1]
        for line in reversed(lines[1 if start else 0 :]):
            offset -= len(line) + 1
            yield offset, line
        rest = lines[0] + b"\n" if lines and start else b""
        position = start


def _is_full(line: bytes) -> bool:
    return line[TIME_LENGTH + 1 :].split(b" ", 2)[1:2] == [b"F"]


def text_of(time: datetime) -> str:
    """A time as it stands in a log."""
    try:
        return time.astimezone(UTC).isoformat(timespec="microseconds")[:26] + "000Z"
    except OverflowError:
        raise InvalidArgument(f"{time} is no time for a log") from None


def cut_after(lines: bytes, until: str) -> bytes:
    """The lines that are not younger than a time."""
    kept = 0
    while (end := lines.find(b"\n", kept)) >= 0:
        if lines[kept : kept + TIME_LENGTH].decode("latin-1") > until:
            break
        kept = end + 1
    return lines[:kept]


def raw(lines: bytes) -> dict[str, bytes]:
    """What was written to each stream, byte by byte, from whole lines."""
    streams: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    for line in lines.split(b"\n")[:-1]:
        with suppress(ValueError, KeyError):
            _, stream, tag, text = line.split(b" ", 3)
            streams[stream.decode()] += [text, b"\n"] if tag == b"F" else [text]
    return {name: b"".join(parts) for name, parts in streams.items()}
