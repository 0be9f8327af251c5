"""The rows: one per task and one per process of it, so that a restarted service knows what it had promised."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from wherry_shared.api.task import Stdio
from wherry_shared.sqlite import Database, Transaction

MIGRATIONS = (
    """
    CREATE TABLE tasks (
        namespace TEXT NOT NULL, container TEXT NOT NULL, bundle TEXT NOT NULL, binary TEXT NOT NULL,
        boot TEXT NOT NULL, PRIMARY KEY (namespace, container)) WITHOUT ROWID;
    CREATE TABLE processes (
        namespace TEXT NOT NULL, container TEXT NOT NULL, exec TEXT NOT NULL, pid INTEGER NOT NULL,
        status TEXT NOT NULL, spec TEXT NOT NULL, stdio TEXT NOT NULL, exit_status INTEGER, exited_ns INTEGER,
        PRIMARY KEY (namespace, container, exec)) WITHOUT ROWID;
    """,
    """
    CREATE TABLE removals (
        namespace TEXT NOT NULL, container TEXT NOT NULL, born TEXT NOT NULL,
        PRIMARY KEY (namespace, container, born)) WITHOUT ROWID;
    """,
    "ALTER TABLE processes ADD COLUMN kept INTEGER NOT NULL DEFAULT -1;",
    "ALTER TABLE processes ADD COLUMN hold TEXT NOT NULL DEFAULT '';",
    "ALTER TABLE tasks ADD COLUMN root TEXT NOT NULL DEFAULT '';",
    "CREATE TABLE home (place TEXT NOT NULL);",
)


@dataclass
class TaskRow:
    """A task as it stands on disk. boot: the kernel's boot id when it was made. root: where its root filesystem is
    written to; "" where nobody knows."""

    namespace: str
    container: str
    bundle: str
    binary: str
    boot: str
    root: str = ""


@dataclass
class ProcessRow:
    """A process as it stands on disk. spec: the file in the bundle that holds an exec's OCI process. kept: for how many
    seconds one of exec stays after its end, while nobody asks about it; -1: until it is deleted. hold: for what a
    paused init stands still; "": until somebody resumes it."""

    exec: str
    pid: int
    status: str
    spec: str
    stdio: Stdio
    exit_status: int | None = None
    exited_ns: int | None = None
    kept: int = -1
    hold: str = ""

    @property
    def exited_at(self) -> datetime | None:
        return None if self.exited_ns is None else datetime.fromtimestamp(self.exited_ns / 1e9, UTC)


def tasks(database: Database) -> list[TaskRow]:
    """Every task."""
    return [TaskRow(*row) for row in database.all("SELECT namespace, container, bundle, binary, boot, root FROM tasks")]


def processes(database: Database, namespace: str, container: str) -> list[ProcessRow]:
    """Every process of a task, the init ("") first."""
    rows = database.all(
        "SELECT exec, pid, status, spec, stdio, exit_status, exited_ns, kept, hold FROM processes"
        " WHERE namespace = ? AND container = ? ORDER BY exec",
        (namespace, container),
    )
    return [_process(row) for row in rows]


def _process(row: Any) -> ProcessRow:
    exec_id, pid, status, spec, stdio, exit_status, exited_ns, kept, hold = row
    return ProcessRow(exec_id, pid, status, spec, Stdio(**json.loads(stdio)), exit_status, exited_ns, kept, hold)


def put_task(tx: Transaction, row: TaskRow) -> None:
    """Record a new task."""
    tx.execute(
        "INSERT INTO tasks (namespace, container, bundle, binary, boot, root) VALUES (?, ?, ?, ?, ?, ?)",
        (row.namespace, row.container, row.bundle, row.binary, row.boot, row.root),
    )


def home(database: Database) -> str:
    """Where this database was when it was last used; "": it is new, or an older version used it."""
    found = database.one("SELECT place FROM home")
    return str(found[0]) if found else ""


def arrive(tx: Transaction, place: str) -> None:
    """It is used here."""
    tx.execute("DELETE FROM home")
    tx.execute("INSERT INTO home (place) VALUES (?)", (place,))


def move_bundle(tx: Transaction, row: TaskRow, bundle: str) -> None:
    """A task's bundle is to be found elsewhere."""
    tx.execute(
        "UPDATE tasks SET bundle = ? WHERE namespace = ? AND container = ?", (bundle, row.namespace, row.container)
    )


def put_process(tx: Transaction, namespace: str, container: str, row: ProcessRow) -> None:
    """Record a process, or its new state."""
    tx.execute(
        "INSERT OR REPLACE INTO processes"
        " (namespace, container, exec, pid, status, spec, stdio, exit_status, exited_ns, kept, hold)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            namespace, container, row.exec, row.pid, row.status, row.spec, row.stdio.model_dump_json(),
            row.exit_status, row.exited_ns, row.kept, row.hold,
        ),
    )  # fmt: skip


def delete_task(tx: Transaction, namespace: str, container: str) -> None:
    """Forget a task and its processes."""
    tx.execute("DELETE FROM tasks WHERE namespace = ? AND container = ?", (namespace, container))
    tx.execute("DELETE FROM processes WHERE namespace = ? AND container = ?", (namespace, container))


def delete_process(tx: Transaction, namespace: str, container: str, exec_id: str) -> None:
    """Forget a process of exec."""
    tx.execute(
        "DELETE FROM processes WHERE namespace = ? AND container = ? AND exec = ?", (namespace, container, exec_id)
    )


def removals(database: Database) -> list[tuple[str, str, str]]:
    """Containers that are to go when their tasks have ended: namespace, id, and when each was made."""
    return list(database.all("SELECT namespace, container, born FROM removals"))


def put_removal(tx: Transaction, namespace: str, container: str, born: str) -> None:
    """Promise that a container goes with its task's end."""
    tx.execute("INSERT OR IGNORE INTO removals VALUES (?, ?, ?)", (namespace, container, born))


def delete_removal(tx: Transaction, namespace: str, container: str, born: str) -> None:
    """The promise is kept."""
    tx.execute("DELETE FROM removals WHERE namespace = ? AND container = ? AND born = ?", (namespace, container, born))
