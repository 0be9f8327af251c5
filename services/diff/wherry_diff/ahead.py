"""Lets one thread work ahead of another, by a bounded number of pieces."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from types import TracebackType


class Ahead:
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
