"""What the supervisor does once, before it forks, so that no service does it in memory of its own.

A forked process shares a page until it writes to it, and counting references is writing. So code is loaded, codecs are
built and caches are filled before; and what a service allocates lies on pages that are new, not in old ones' holes.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from wherry_shared import api
from wherry_shared.bus import load_connection

# CPython's small objects come in classes of 16 bytes up to 512, out of pools of 16 KiB (Objects/obmalloc.c).
_CLASS, _LARGEST, _POOL, _POOL_HEADER = 16, 512, 1 << 14, 48
_BYTES_OVERHEAD = 33


def preload(modules: Iterable[str]) -> list[bytes]:
    """Load what every service needs, and keep collections from copying its pages. To be held as long as forks come."""
    for module in ("uvloop", "wherry_shared.runtime", "wherry_shared.sqlite", *modules):
        importlib.import_module(module)
    load_connection()
    api.build()
    rehearse()
    gc.collect()
    gc.freeze()
    return fill()


def rehearse() -> None:
    """Settings, a loop and a database as a service has them: the interpreter adapts code where it has run."""
    import uvloop
    from wherry_shared.runtime import Settings
    from wherry_shared.sqlite import Database

    async def _database(path: Path) -> None:
        database = await Database.open(path, ())
        await database.write(lambda tx: tx.execute("DELETE FROM outbox").close())
        await database.close()

    Settings.parse("rehearsal", [])
    with TemporaryDirectory(prefix="wherry-") as scratch:
        uvloop.run(_database(Path(scratch, "metadata.db")))
    asyncio.set_event_loop(None)


def fill() -> list[bytes]:
    """Take what is free in the pools that are in use, some 0.6 MiB: what comes later gets fresh ones."""
    held: list[bytes] = []
    for size in range(3 * _CLASS, _LARGEST + 1, _CLASS):
        in_a_row, needed, last = 0, (_POOL - _POOL_HEADER) // size - 2, 0
        while in_a_row < needed:  # a fresh pool gives its blocks out one after the other
            block = bytes(size - _BYTES_OVERHEAD)
            held.append(block)
            in_a_row = in_a_row + 1 if id(block) == last + size else 0
            last = id(block)
        del held[-needed:]
    return held
