"""The rows of the events service: what it published for others a moment ago."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wherry_shared.bus.events import Outgoing
from wherry_shared.sqlite import Database, Transaction

MIGRATIONS = (
    """
CREATE TABLE kept (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, subject TEXT NOT NULL, data BLOB NOT NULL,
    at TEXT NOT NULL, boot TEXT NOT NULL)
""",
)


# Rows of one statement: each statement takes the interpreter's lock twice, from the loop that has other work.
TOGETHER = 32


def _rows(count: int) -> str:
    return ", ".join(["(?, ?, ?, ?, ?)"] * count)


class Row(NamedTuple):
    """An event, its number here, and when (ISO format) it was published."""

    seq: int
    event: Outgoing
    at: str


class Rows:
    """Events by the boot in which they were published."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of_others(self, boot: str) -> list[Row]:
        """Those of every other boot, in order."""
        found = self._database.all("SELECT seq, at, subject, data, id FROM kept WHERE boot != ? ORDER BY seq", (boot,))
        return [Row(seq, Outgoing(*event), at) for seq, at, *event in found]

    async def adopt(self, boot: str, upto: int) -> None:
        """Those up to a number are of this boot from now on."""
        await self._database.write(
            lambda tx: tx.execute("UPDATE kept SET boot = ? WHERE seq <= ?", (boot, upto)).rowcount
        )

    async def add(self, events: Sequence[Outgoing], at: str, boot: str, forgotten: int) -> int:
        """Durably add some, with numbers in a row, and delete those up to `forgotten`. Answers the last number."""

        def insert(tx: Transaction) -> int:
            last = 0
            for begin in range(0, len(events), TOGETHER):
                some = events[begin : begin + TOGETHER]
                values = [value for event in some for value in (event.id, event.subject, event.data, at, boot)]
                made = tx.execute(f"INSERT INTO kept (id, subject, data, at, boot) VALUES {_rows(len(some))}", values)  # noqa: S608
                last = made.lastrowid or 0
            if forgotten:
                tx.execute("DELETE FROM kept WHERE seq <= ?", (forgotten,))
            return last

        return await self._database.write(insert)

    async def remove(self, numbers: Sequence[int]) -> None:
        """Durably delete those."""

        def delete(tx: Transaction) -> None:
            for number in numbers:
                tx.execute("DELETE FROM kept WHERE seq = ?", (number,))

        await self._database.write(delete, frees=True)
