"""What callers published and the stream acknowledged a moment ago, kept until the stream's files surely have it.

Services keep their own events in their outboxes (wherry_shared.outbox); callers have none, so this is theirs.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from wherry_shared.bus import events
from wherry_shared.bus.transport import EventLog, Transport
from wherry_shared.epoch import boot_id
from wherry_shared.outbox import Recent
from wherry_shared.sqlite import Database, Transaction
from wherry_shared.values import now

MIGRATIONS = (
    """
CREATE TABLE kept (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, subject TEXT NOT NULL, data BLOB NOT NULL,
    at TEXT NOT NULL, boot TEXT NOT NULL)
""",
)
# The stream's times are nats-server's, ours this process's.
_CLOCK = timedelta(seconds=60)


class Kept:
    """Keeps events over a power cut that the stream may not survive whole."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._boot = boot_id()
        self._recent = Recent()

    async def restore(self, log: EventLog, transport: Transport) -> None:
        """Give the stream again what a power cut took from it. Unavailable when it takes it not."""
        rows = self._database.all(
            "SELECT seq, id, subject, data, at FROM kept WHERE boot != ? ORDER BY seq", (self._boot,)
        )
        if not rows:
            return
        there = await _stored_since(log, min(datetime.fromisoformat(row[4]) for row in rows) - _CLOCK)
        for _, event_id, subject, data, _ in rows:
            if event_id not in there:
                await events.publish(transport, events.Outgoing(subject, data, event_id))
        # They are kept on, as what this boot published.
        await self._database.write(
            lambda tx: tx.execute("UPDATE kept SET boot = ? WHERE seq <= ?", (self._boot, rows[-1][0]))
        )

    async def keep(self, event: events.Outgoing) -> None:
        """Durably keep what the stream has acknowledged."""

        def insert(tx: Transaction) -> None:
            row = (event.id, event.subject, event.data, now().isoformat(), self._boot)
            made = tx.execute("INSERT INTO kept (id, subject, data, at, boot) VALUES (?, ?, ?, ?, ?)", row)
            tx.execute("DELETE FROM kept WHERE seq <= ?", (self._recent.note(made.lastrowid or 0),))

        await self._database.write(insert)


async def _stored_since(log: EventLog, since: datetime) -> set[str]:
    """The ids of the stream's events since a time."""
    found: set[str] = set()
    stored = await log.read(since=since, limit=1000)
    while stored:
        found.update(envelope.id for entry in stored if (envelope := events.decode(entry.data)) is not None)
        stored = await log.read(after=stored[-1].sequence, limit=1000)
    return found
