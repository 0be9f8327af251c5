"""A database's file: opened and found whole, brought up to date, and with some room put by for a full disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import DataLoss, FailedPrecondition, Internal, ResourceExhausted, Unavailable, WherryError

# Freed when the disk is full, so that removals still find room for their own transaction.
BALLAST_BYTES = 1 << 20
# A database up to this size is checked whole when it is opened: some milliseconds.
CHECKED_BYTES_MAX = 32 << 20
# How long another process may hold the database.
BUSY_SECONDS = 10.0

# The log goes to its place in the database when it has so many pages.
CHECKPOINT_PAGES = 512

_BASE = """
CREATE TABLE IF NOT EXISTS outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, namespace TEXT NOT NULL, topic TEXT NOT NULL,
    at TEXT NOT NULL, event TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sent (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL, namespace TEXT NOT NULL, topic TEXT NOT NULL, at TEXT NOT NULL,
    event TEXT NOT NULL, boot TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, reply BLOB NOT NULL, at INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_at ON answers (at);
"""
_PRAGMAS = (
    "journal_mode=WAL", "synchronous=FULL", f"wal_autocheckpoint={CHECKPOINT_PAGES}", "journal_size_limit=2097152",
    "foreign_keys=ON",
)  # fmt: skip
# linux/fs.h: a file whose blocks are written over, not copied.
_GET_FLAGS, _SET_FLAGS, _NO_COPY = 0x80086601, 0x40086602, 0x00800000
_RESTORE = "restore it from a backup, or move it away with its -wal and its .ballast to start empty"


def connect(path: Path) -> sqlite3.Connection:
    """A connection with the house's settings; any thread may use it, one at a time."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_SECONDS)
    try:
        os.chmod(path, 0o600)
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


def open_database(path: Path, migrations: Sequence[str]) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    """The writer's and the reader's connection, to a database of the newest schema.

    FailedPrecondition: its schema is newer than `migrations`. DataLoss: it is damaged, or empty and was not.
    ResourceExhausted: the disk is full, also without the ballast.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    ballast = Ballast(path)
    if ballast.there and not (path.exists() and path.stat().st_size):
        raise DataLoss(f"database {path} is empty, and was not: {_RESTORE}")
    _keep_index_in_place(path)
    try:
        return _open_patiently(path, migrations)
    except sqlite3.DatabaseError as e:
        if not (is_full(e) and ballast.there):
            raise translate(e, path) from None
    ballast.drop()
    try:
        return _open(path, migrations)
    except sqlite3.DatabaseError as e:
        raise translate(e, path) from None


def _keep_index_in_place(path: Path) -> None:
    """Make the log's shared index a file that btrfs writes over.

    SQLite maps it. A page of a copied-on-write file that was written back needs room again when it changes, and where
    there is none the kernel can only end the process (SIGBUS).
    """
    # Nobody else's: to close it would let go of all locks that this process has on it.
    with contextlib.suppress(OSError):
        fd = os.open(f"{path}-shm", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            flags = int.from_bytes(fcntl.ioctl(fd, _GET_FLAGS, bytes(8))[:4], "little")
            fcntl.ioctl(fd, _SET_FLAGS, (flags | _NO_COPY).to_bytes(8, "little"))
        finally:
            os.close(fd)


def _open_patiently(path: Path, migrations: Sequence[str]) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    """SQLite does not wait by itself for another process that makes or recovers the log at this moment."""
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return _open(path, migrations)
        except sqlite3.OperationalError as e:
            if not is_busy(e) or time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def _open(path: Path, migrations: Sequence[str]) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    opened: list[sqlite3.Connection] = []
    try:
        opened.append(connect(path))
        if path.stat().st_size <= CHECKED_BYTES_MAX:
            _check(opened[0], path)
        _migrate(opened[0], migrations, path)
        opened.append(connect(path))
    except BaseException:
        for connection in opened:
            connection.close()
        raise
    return opened[0], opened[1]


def _check(connection: sqlite3.Connection, path: Path) -> None:
    found: str = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise DataLoss(f"database {path} is damaged ({found.splitlines()[-1]}): {_RESTORE}")


def _migrate(connection: sqlite3.Connection, migrations: Sequence[str], path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(migrations):
            raise FailedPrecondition(
                f"{path} has schema {version}, and this version knows only {len(migrations)}: run the newer one"
            )
        # Only now: a newer version's database stays as it is.
        for number, script in enumerate([_BASE, *migrations[version:]], version):
            for statement in _statements(script):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _statements(script: str) -> Iterator[str]:
    """The statements of a script; a semicolon in a text or a trigger does not end one."""
    statement = ""
    for part in script.split(";"):
        statement += part
        if sqlite3.complete_statement(statement + ";"):
            yield statement
            statement = ""
        else:
            statement += ";"
    if statement.strip(" \n;"):
        yield statement


def _code(e: sqlite3.Error) -> int:
    """The primary result code; what sqlite3 raises by itself has none."""
    return getattr(e, "sqlite_errorcode", 0) & 0xFF


def is_full(e: sqlite3.Error) -> bool:
    # The shared index of the log is made with the file's full length, which a full disk refuses with an I/O error.
    extended = getattr(e, "sqlite_errorcode", 0)
    return _code(e) == sqlite3.SQLITE_FULL or extended == sqlite3.SQLITE_IOERR_SHMSIZE


def is_broken(e: sqlite3.Error) -> bool:
    return _code(e) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM)


def is_busy(e: sqlite3.Error) -> bool:
    return _code(e) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def translate(e: sqlite3.Error, path: Path) -> WherryError:
    if is_full(e):
        return ResourceExhausted(f"no space left for {path}")
    if _code(e) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DataLoss(f"database {path} is damaged ({e}): {_RESTORE}")
    if is_busy(e):
        return Unavailable(f"database {path} is locked by another process")
    return Internal(f"database {path}: {e}")


class Ballast:
    """A file beside the database that is dropped when the disk is full."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + ".ballast")

    @property
    def there(self) -> bool:
        return self._path.exists()

    def make(self) -> bool:
        """Whether it is there now; a disk that is full has none to give."""
        if self.there:
            return True
        try:
            with open(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as f:
                os.posix_fallocate(f.fileno(), 0, BALLAST_BYTES)
        except OSError:
            self._path.unlink(missing_ok=True)
            return False
        return True

    def drop(self) -> None:
        self._path.unlink(missing_ok=True)
