"""Applies a layer in one pass: decompress, hash and extract."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import BinaryIO

from .decompress import decompress
from .extract import Target, extract
from .limits import DEFAULT, Limits
from .tar import Reader, Stream

_AHEAD = 16  # pieces of 256 KiB that may wait between the two threads


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a layer: the digest and size (bytes) of the whole uncompressed stream, and how many entries."""

    diff_id: str
    size: int
    entries: int


def apply(source: BinaryIO | Iterable[bytes], media_type: str, target: Target, limits: Limits = DEFAULT) -> Applied:
    """Extract the layer in `source` onto `target`; blocks, so call it in a thread or process of its own.

    `source` is read in another thread, by one `read` or `next` at a time, never after the return; it is not closed.
    A return, an error's too, waits for the read in hand. Raises `Unimplemented` (media type), `DataLoss` (cut off or
    corrupt), `Unavailable` (the source raised an `OSError`), and what `extract` raises; other errors of the source pass
    through as they are.
    """
    hashed = _Hashed(decompress(source, media_type, limits))
    with _Ahead(hashed, _AHEAD) as pieces:
        entries = extract(Reader(Stream(pieces), limits), target, limits)
    return Applied(f"sha256:{hashed.sha256.hexdigest()}", hashed.size, entries)


class _Hashed:
    """Pieces as they pass, hashed and counted."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self.sha256 = hashlib.sha256()
        self.size = 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self.sha256.update(piece)
            self.size += len(piece)
            yield piece


class _Ahead:
    """Runs an iterable in a thread, up to `depth` items ahead of who iterates over this.

    The decompressor, the hash and write(2) let go of the interpreter's lock, so both threads do work at one time.
    """

    def __init__(self, items: Iterable[bytes], depth: int) -> None:
        self._items = items
        self._ready: SimpleQueue[bytes | BaseException | None] = SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="wherry-decompress", daemon=True)

    def __enter__(self) -> Iterator[bytes]:
        self._thread.start()
        return self._taken()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._room.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                self._room.acquire()
                if self._stopped:
                    return
                self._ready.put(item)
            self._ready.put(None)
        except BaseException as error:  # not lost: it is raised where the items are taken
            self._ready.put(error)

    def _taken(self) -> Iterator[bytes]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            self._room.release()
