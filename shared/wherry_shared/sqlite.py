"""One SQLite database per service: migrations, grouped durable writes, remembered answers, and the outbox.

Reads run at once on a connection of the event loop (microseconds). Writes run in one thread; those that wait
together share a transaction and its fsync, each in a savepoint of its own. A write's events go to the outbox in the
same transaction, so that neither can be there without the other.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from . import context
from .errors import DataLoss, FailedPrecondition, Internal, ResourceExhausted, Unavailable
from .values import now

T = TypeVar("T")

GROUP_MAX = 64
# Freed when the disk is full, so that removals still find room for their own transaction.
BALLAST_BYTES = 1 << 20
REMEMBER_SECONDS = 600

_BASE = """
CREATE TABLE IF NOT EXISTS outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, namespace TEXT NOT NULL, topic TEXT NOT NULL,
    at TEXT NOT NULL, event TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, reply BLOB NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_at ON answers (at);
"""


class Transaction:
    """One write in hand: SQL, and the events that it causes."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.events = 0

    def execute(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        return self._connection.execute(sql, parameters)

    def one(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """The first row, or None."""
        return self._connection.execute(sql, parameters).fetchone()

    def publish(self, topic: str, event: dict[str, Any], *, namespace: str = "") -> None:
        """Put an event (a JSON object) into the outbox; the namespace is the request's unless given."""
        self.execute(
            "INSERT INTO outbox (id, namespace, topic, at, event) VALUES (?, ?, ?, ?, ?)",
            (secrets.token_hex(12), namespace or context.namespace(), topic, now().isoformat(), json.dumps(event)),
        )
        self.events += 1


class _Write:
    """A queued write: its function, the context it was asked in, and where its result goes."""

    __slots__ = ("context", "error", "frees", "function", "future", "remember", "result")

    def __init__(
        self, function: Callable[[Transaction], Any], future: asyncio.Future[Any], *, frees: bool, remember: bool
    ) -> None:
        self.function = function
        self.remember = remember
        self.future = future
        self.frees = frees
        self.context = contextvars.copy_context()
        self.result: Any = None
        self.error: BaseException | None = None


class Database:
    """A service's database. Open it with `Database.open`, end it with `close`."""

    def __init__(self, path: Path, reader: sqlite3.Connection, writer: sqlite3.Connection) -> None:
        self.path = path
        self._reader = reader
        self._writer = writer
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name=f"sqlite:{path.name}", daemon=True)
        self.on_events: Callable[[], None] | None = None
        self._thread.start()

    @classmethod
    async def open(cls, path: Path, migrations: Sequence[str]) -> Database:
        """Open or make the database and bring its schema up to date (one SQL script per version).

        FailedPrecondition: a newer version of the service wrote it. DataLoss: it is damaged; the path is named.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            writer = _connect(path)
            _migrate(writer, migrations, path)
            reader = _connect(path)
        except sqlite3.DatabaseError as e:
            raise _translate(e, path) from None
        _make_ballast(path)
        return cls(path, reader, writer)

    def all(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[Any]:
        """The rows of a query, read now."""
        try:
            return self._reader.execute(sql, parameters).fetchall()
        except sqlite3.DatabaseError as e:
            raise _translate(e, self.path) from None

    def one(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> Any:
        """The first row of a query, read now, or None."""
        try:
            return self._reader.execute(sql, parameters).fetchone()
        except sqlite3.DatabaseError as e:
            raise _translate(e, self.path) from None

    async def write(self, function: Callable[[Transaction], T], *, frees: bool = False) -> T:
        """Run `function` in a durable transaction and answer its result.

        frees: a removal, which may use the ballast when the disk is full. ResourceExhausted when it is full.
        """
        return await self._enqueue(function, frees=frees, remember=False)

    async def mutate(self, function: Callable[[Transaction], T], *, frees: bool = False) -> T:
        """The write that is a request's whole effect: `function` returns what the endpoint answers.

        If the request in hand carries an idempotency key, the answer is kept under it in the same transaction; a key
        that took effect before raises Replayed, which answers as it did then.
        """
        return await self._enqueue(function, frees=frees, remember=True)

    async def _enqueue(self, function: Callable[[Transaction], T], *, frees: bool, remember: bool) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Write(function, future, frees=frees, remember=remember))
        return await future

    async def close(self) -> None:
        """End the writer after what is queued."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._reader.close()
        self._writer.close()

    # ---- the writer's thread

    def _work(self) -> None:
        stop = False
        while not stop:
            first = self._queue.get()
            if first is None:
                return
            group = [first]
            while len(group) < GROUP_MAX:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    stop = True
                    break
                group.append(more)
            events = self._commit(group)
            self._loop.call_soon_threadsafe(self._settle, group, events)

    def _commit(self, group: list[_Write]) -> int:
        try:
            return self._transact(group)
        except sqlite3.DatabaseError as e:
            if not _is_full(e):
                return self._fail(group, _translate(e, self.path))
        # The disk is full: removals run again with the ballast's room, the others are told.
        frees = [w for w in group if w.frees]
        self._fail([w for w in group if not w.frees], ResourceExhausted(f"no space left for {self.path}"))
        if not frees:
            return 0
        _ballast(self.path).unlink(missing_ok=True)
        try:
            return self._transact(frees)
        except sqlite3.DatabaseError as e:
            return self._fail(frees, _translate(e, self.path))

    @staticmethod
    def _fail(group: list[_Write], error: BaseException) -> int:
        for write in group:
            write.error = error
        return 0

    def _transact(self, group: list[_Write]) -> int:
        connection = self._writer
        connection.execute("BEGIN IMMEDIATE")
        try:
            transaction = Transaction(connection)
            for write in group:
                self._run(connection, transaction, write)
            connection.execute("DELETE FROM answers WHERE at < ?", (time.time() - REMEMBER_SECONDS,))
            connection.execute("COMMIT")
            return transaction.events
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    @staticmethod
    def _run(connection: sqlite3.Connection, transaction: Transaction, write: _Write) -> None:
        connection.execute("SAVEPOINT one")
        try:
            write.result = write.context.run(_once if write.remember else _plainly, transaction, write.function)
            write.error = None
        except sqlite3.DatabaseError as e:
            if _is_full(e) or not isinstance(e, sqlite3.IntegrityError):
                raise
            write.error = Internal(f"constraint failed: {e}")
        except BaseException as e:
            write.error = e
        if write.error is not None:
            connection.execute("ROLLBACK TO one")
        connection.execute("RELEASE one")

    def _settle(self, group: list[_Write], events: int) -> None:
        for write in group:
            if write.future.done():
                continue
            if write.error is not None:
                write.future.set_exception(write.error)
            else:
                write.future.set_result(write.result)
        if events and self.on_events is not None:
            self.on_events()


def _once(transaction: Transaction, function: Callable[[Transaction], T]) -> T:
    """Run a write unless its request's key took effect before; remember its answer under the key."""
    ctx = context.current()
    if not ctx.key or ctx.encode is None:
        return function(transaction)
    row = transaction.one("SELECT reply FROM answers WHERE key = ?", (ctx.key,))
    if row is not None:
        raise context.Replayed(row[0])
    result = function(transaction)
    transaction.execute(
        "INSERT INTO answers (key, reply, at) VALUES (?, ?, ?)", (ctx.key, ctx.encode(result), time.time())
    )
    return result


def _plainly(transaction: Transaction, function: Callable[[Transaction], T]) -> T:
    return function(transaction)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    os.chmod(path, 0o600)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA wal_autocheckpoint=512")
    connection.execute("PRAGMA journal_size_limit=2097152")
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def _migrate(connection: sqlite3.Connection, migrations: Sequence[str], path: Path) -> None:
    connection.executescript(f"BEGIN IMMEDIATE; {_BASE} COMMIT;")
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(migrations):
            raise FailedPrecondition(
                f"{path} has schema {version}, and this version knows only {len(migrations)}: run the newer one"
            )
        for number, script in enumerate(migrations[version:], version + 1):
            for statement in script.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _is_full(e: sqlite3.DatabaseError) -> bool:
    return getattr(e, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL or "disk is full" in str(e)


def _translate(e: sqlite3.DatabaseError, path: Path) -> Exception:
    code = getattr(e, "sqlite_errorcode", 0) & 0xFF
    if _is_full(e):
        return ResourceExhausted(f"no space left for {path}")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DataLoss(f"database {path} is damaged ({e}): restore it from a backup, or move it away to start empty")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable(f"database {path} is locked by another process")
    return Internal(f"database {path}: {e}")


def _ballast(path: Path) -> Path:
    return path.with_name(path.name + ".ballast")


def _make_ballast(path: Path) -> None:
    ballast = _ballast(path)
    if ballast.exists():
        return
    try:
        with ballast.open("xb") as f:
            os.posix_fallocate(f.fileno(), 0, BALLAST_BYTES)
    except OSError:
        ballast.unlink(missing_ok=True)  # a disk that is full already has no ballast to give
