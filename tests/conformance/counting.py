"""A service in a process of its own, to be killed, which counts what it is asked to:

    counting.py URL CREDENTIALS DATABASE [STATE]

STATE is a node's state directory, for the direct path.

It prints `ready` when it serves and `began` when a call is in hand. `hold` keeps each call for that many seconds,
once per name.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, Protocol

from wherry_shared.bus import connect, credentials
from wherry_shared.contract import Contract, endpoint
from wherry_shared.sqlite import Database, Transaction

SCHEMA = ("CREATE TABLE calls (name TEXT, n INTEGER)",)


class Counting(Contract, Protocol, service="image", version="1.0.0"):
    """Counts."""

    @endpoint(mutates=True)
    async def count(self, name: str, hold: float = 0.0) -> int:
        """Note a call, after `hold` seconds; answers how many of this name there were."""
        ...

    @endpoint()
    async def calls(self, name: str, anything: Any = None) -> int:
        """How many there were."""
        ...


class CountingService(Counting):
    def __init__(self, database: Database) -> None:
        self.database = database

    async def count(self, name: str, hold: float = 0.0) -> int:
        print("began", flush=True)
        await asyncio.sleep(hold)

        def write(tx: Transaction) -> int:
            tx.execute("INSERT INTO calls VALUES (?, 1)", (name,))
            n: int = tx.one("SELECT count(*) FROM calls WHERE name = ?", (name,))[0]
            return n

        return await self.database.mutate(write)

    async def calls(self, name: str, anything: Any = None) -> int:
        return int(self.database.one("SELECT count(*) FROM calls WHERE name = ?", (name,))[0])


async def main(url: str, creds: str, path: str, state: str = "") -> None:
    own = credentials.find(Path(creds), "image")
    bus = await connect(
        [url], node="n1", name="image", seed=own.seed, inbox_prefix=own.inbox_prefix,
        identity_of=credentials.Identities(Path(creds)), direct=Path(state) if state else None,
    )  # fmt: skip
    await bus.serve(CountingService(await Database.open(Path(path), SCHEMA)))
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
