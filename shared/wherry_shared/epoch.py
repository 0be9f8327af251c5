"""The epoch of a garbage collection in one database: what changed since it began, and the freeze at its end.

A database whose migrations hold `SCHEMA` and `journal(...)` takes part in collections. All processes that have it open
obey, since all of it lies in the database. Times are of the clock that runs from boot on, so that no change of the date
moves them. docs/decisions/0010 says what it is for.
"""

from __future__ import annotations

import enum
import sqlite3
import time
from collections.abc import Callable

from .boot import boot_id
from .errors import FailedPrecondition

Execute = Callable[..., sqlite3.Cursor]

# A sweep has to be over while at least this share of its freeze is left: the other services' end at the same time.
MARGIN = 0.5

# One row at most in gc_epoch. `deletions`: whether something went that no collection has seen yet.
SCHEMA = """
CREATE TABLE gc_epoch (
    id TEXT NOT NULL, boot TEXT NOT NULL, until REAL NOT NULL, frozen REAL NOT NULL DEFAULT 0,
    seconds REAL NOT NULL DEFAULT 0, sweeping INTEGER NOT NULL DEFAULT 0);
CREATE TABLE gc_journal (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, type TEXT NOT NULL, namespace TEXT NOT NULL, key TEXT NOT NULL,
    UNIQUE (type, namespace, key));
CREATE TABLE gc_activity (deletions INTEGER NOT NULL);
INSERT INTO gc_activity VALUES (0)
"""


def journal(table: str, type: str, key: str, *, roots: bool = True) -> str:
    """The triggers of a table: while an epoch is on, every row that changes is in the journal.

    type, key: SQL expressions of the node's type and key, with `row.` before a column. roots: its rows keep others, so
    that a deletion makes work for the collector.
    """

    def note(row: str) -> str:
        t, k = type.replace("row.", f"{row}."), key.replace("row.", f"{row}.")
        return (
            f"DELETE FROM gc_journal WHERE type = {t} AND namespace = {row}.namespace AND key = {k}; "  # noqa: S608 - of our own expressions
            f"INSERT INTO gc_journal (type, namespace, key) VALUES ({t}, {row}.namespace, {k});"
        )

    when = "WHEN EXISTS (SELECT 1 FROM gc_epoch WHERE sweeping = 0)"
    made = [
        f"CREATE TRIGGER gc_{table}_insert AFTER INSERT ON {table} {when} BEGIN {note('new')} END",
        f"CREATE TRIGGER gc_{table}_update AFTER UPDATE ON {table} {when} BEGIN {note('old')} {note('new')} END",
        f"CREATE TRIGGER gc_{table}_delete AFTER DELETE ON {table} {when} BEGIN {note('old')} END",
    ]
    if roots:
        swept = "EXISTS (SELECT 1 FROM gc_epoch WHERE sweeping = 1)"
        made.append(
            f"CREATE TRIGGER gc_{table}_gone AFTER DELETE ON {table} WHEN NOT {swept} BEGIN {DELETED}; END"
        )  # fmt: skip
    return ";\n".join(made)


DELETED = "UPDATE gc_activity SET deletions = 1 WHERE deletions = 0"


def clock() -> float:
    """Seconds since boot, those of a suspension included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def takes_part(execute: Execute) -> bool:
    """Whether a database has the tables of an epoch."""
    return execute("SELECT 1 FROM sqlite_master WHERE name = 'gc_epoch'").fetchone() is not None


class State(enum.Enum):
    """Of a database: no epoch, one that notes what changes, one whose freeze holds mutations."""

    NONE, ON, FROZEN = range(3)


def state(execute: Execute) -> State:
    """How it is now. To be asked within a write transaction; it ends a lapsed epoch."""
    row = execute("SELECT boot, until, frozen FROM gc_epoch").fetchone()
    if row is None:
        return State.NONE
    boot, until, frozen = row
    if boot != boot_id() or until <= clock():
        clear(execute)
        return State.NONE
    return State.FROZEN if frozen > clock() else State.ON


def clear(execute: Execute) -> None:
    """End whatever epoch there is."""
    execute("DELETE FROM gc_epoch")
    execute("DELETE FROM gc_journal")


def begin(execute: Execute, epoch: str, seconds: float) -> None:
    """Journal from now on, for at most `seconds`; another epoch that was under way can do nothing more."""
    clear(execute)
    execute("INSERT INTO gc_epoch (id, boot, until) VALUES (?, ?, ?)", (epoch, boot_id(), clock() + seconds))
    execute("UPDATE gc_activity SET deletions = 0")


def check(execute: Execute, epoch: str) -> None:
    """FailedPrecondition unless the epoch is on."""
    row = execute("SELECT boot, until FROM gc_epoch WHERE id = ?", (epoch,)).fetchone()
    if row is None or row[0] != boot_id() or row[1] <= clock():
        raise FailedPrecondition(f"the collection {epoch} is not under way here (any more)")


def freeze(execute: Execute, epoch: str, seconds: float) -> None:
    """Hold mutations for at most `seconds`."""
    check(execute, epoch)
    execute("UPDATE gc_epoch SET frozen = ?, seconds = ?", (clock() + seconds, seconds))


def thaw(execute: Execute, epoch: str) -> None:
    """Hold them no longer; an epoch that is not on holds none."""
    execute("UPDATE gc_epoch SET frozen = 0 WHERE id = ?", (epoch,))


def end(execute: Execute, epoch: str) -> None:
    """Journal no longer."""
    if execute("DELETE FROM gc_epoch WHERE id = ?", (epoch,)).rowcount:
        clear(execute)


def check_frozen(execute: Execute, epoch: str) -> None:
    """FailedPrecondition unless the epoch's freeze is on, with enough of it left."""
    check(execute, epoch)
    frozen, seconds = execute("SELECT frozen, seconds FROM gc_epoch").fetchone()
    if frozen - clock() < seconds * MARGIN or not frozen:
        raise FailedPrecondition(f"the freeze of the collection {epoch} is over, or too near its end")


def sweeping(execute: Execute, *, on: bool) -> None:
    """Removals in between are the collector's own: they go into no journal and make no work."""
    execute("UPDATE gc_epoch SET sweeping = ?", (int(on),))


def changes(execute: Execute, after: int, limit: int) -> list[tuple[int, str, str, str]]:
    """Sequence number, type, namespace and key of what changed, each thing at its last change."""
    return execute(
        "SELECT seq, type, namespace, key FROM gc_journal WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit)
    ).fetchall()


def activity(execute: Execute) -> tuple[bool, int]:
    """Whether something was deleted since the last `begin`, and a number that grows with every event."""
    deletions = execute("SELECT deletions FROM gc_activity").fetchone()[0]
    events = execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone()
    return bool(deletions), int(events[0]) if events else 0
