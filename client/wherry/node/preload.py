"""What the supervisor does once, before it forks, so that no service does it in memory of its own.

A forked process shares a page until it writes to it, and counting references is writing. So code is loaded, codecs are
built and caches are filled before; and what a service allocates lies on pages that are new, not in old ones' holes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from wherry_shared import api
from wherry_shared.bus import load_connection
from wherry_shared.bus.proxy import proxy_class
from wherry_shared.runtime import package_version

# CPython's small objects come in classes of 16 bytes up to 512, out of pools of 16 KiB (Objects/obmalloc.c).
_CLASS, _LARGEST, _POOL, _POOL_HEADER = 16, 512, 1 << 14, 48
_BYTES_OVERHEAD = 33
# What is loaded by who runs, not by who is loaded; of a service's own that is what its module lists as LATER.
_COMMON = ("uvloop", "wherry_shared.sqlite", "wherry_shared.bus.direct", "wherry.client", "wherry.node.keeper")
_TRIES = 1 << 14  # of each class: another allocator than CPython's has no pools


def preload(services: Mapping[str, str]) -> list[bytes]:
    """Load what every service (`name -> module:function`) needs, and keep collections from copying its pages.

    What it returns is to be held as long as there are forks to come.
    """
    for module in (*_COMMON, *(entry.partition(":")[0] for entry in services.values())):
        for later in getattr(importlib.import_module(module), "LATER", ()):
            importlib.import_module(later)
    for name in services:
        package_version(f"wherry-{name}")
    load_connection()
    api.build()
    for contract in (*api.contracts(), *api.second_contracts()):
        proxy_class(contract)
    describe()
    rehearse()
    gc.collect()
    gc.freeze()
    return fill()


def describe() -> None:
    """Have the schemas that services tell of themselves made by a process that ends: making them leaves holes."""
    endpoints = [e for contract in (*api.contracts(), *api.second_contracts()) for e in contract.endpoints.values()]
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with open(write, "w") as pipe:
                json.dump([endpoint.schema for endpoint in endpoints], pipe)
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    with contextlib.suppress(ValueError):  # it was killed, say: each makes its own then
        for endpoint, schema in zip(endpoints, json.loads(told), strict=True):
            endpoint.schema = schema


def rehearse() -> None:
    """A loop and a database as a service has them: the interpreter adapts code where it has run."""
    import uvloop
    from wherry_shared.sqlite import Database

    async def _database(path: Path) -> None:
        database = await Database.open(path, ())
        await database.write(lambda tx: tx.execute("DELETE FROM outbox").close())
        await database.close()

    with TemporaryDirectory(prefix="wherry-") as scratch:
        uvloop.run(_database(Path(scratch, "metadata.db")))
    asyncio.set_event_loop(None)


def fill() -> list[bytes]:
    """Take what is free in the pools that are in use, some 0.6 MiB: what comes later gets fresh ones."""
    held: list[bytes] = []
    for size in range(3 * _CLASS, _LARGEST + 1, _CLASS):
        in_a_row, needed, last = 0, (_POOL - _POOL_HEADER) // size - 2, 0
        for _ in range(_TRIES):
            if in_a_row == needed:
                break  # a fresh pool gives its blocks out one after the other
            block = bytes(size - _BYTES_OVERHEAD)
            held.append(block)
            in_a_row = in_a_row + 1 if id(block) == last + size else 0
            last = id(block)
        del held[-in_a_row:]
    return held
