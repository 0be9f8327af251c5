"""One SQLite database per service: migrations, grouped durable writes, remembered answers, and the outbox.

Reads run at once on a connection of the event loop (microseconds). Writes run in one thread; those that wait
together share a transaction and its fsync, each in a savepoint of its own. A write's events go to the outbox in the
same transaction, so that neither can be there without the other.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import os
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from . import context, epoch
from .errors import Internal, InvalidArgument, ResourceExhausted, Unavailable, WherryError
from .schema import CHECKPOINT_PAGES, Ballast, connect, is_broken, is_full, open_database, translate
from .values import check_identifier, now

T = TypeVar("T")

log = logging.getLogger("wherry.sqlite")

GROUP_MAX = 64
# On a full disk, between the attempts at a removal.
FULL_PAUSES = (0.05, 0.1, 0.2)
# While a collection's freeze holds writes, this often is looked whether it is over.
HELD_SECONDS = 0.001
# So long events of writes that were not durable wait for a durable write, which syncs the log for them as well.
SETTLE_SECONDS = 0.005
REMEMBER_SECONDS = 600
# How often those older than that are looked for: not with each of a thousand groups a second, and few at a time.
FORGET_SECONDS = 0.1
# A sweep touches pages all over: without room for them, SQLite writes and reads each many times.
SWEEP_PRAGMAS = ("cache_size=-65536", "wal_autocheckpoint=0")
REST_PRAGMAS = ("cache_size=-2000", f"wal_autocheckpoint={CHECKPOINT_PAGES}", "shrink_memory")
# An event must fit into a message of 1 MiB, with its envelope and its headers.
EVENT_BYTES_MAX = 960 << 10

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@lru_cache(256)  # a service has a dozen
def _check_topic(topic: str) -> None:
    for part in topic.removeprefix("/").split("/"):
        check_identifier(part, "topic component")


class Transaction:
    """One write in hand: SQL, and the events that it causes."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.last_event = 0  # its number in the outbox

    def execute(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        return self._connection.execute(sql, parameters)

    def one(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """The first row, or None."""
        return self._connection.execute(sql, parameters).fetchone()

    def publish(self, topic: str, event: dict[str, Any], *, namespace: str = "") -> None:
        """Put an event (a JSON object) into the outbox; the namespace is the request's unless given.

        InvalidArgument when its topic, namespace or size are not allowed: it could never leave the outbox.
        """
        namespace = check_identifier(namespace or context.namespace(), "namespace")
        _check_topic(topic)
        body = _to_json(event)
        if len(body) > EVENT_BYTES_MAX or len(body.encode()) > EVENT_BYTES_MAX:
            raise InvalidArgument(f"the event {topic} would be larger than {EVENT_BYTES_MAX} bytes")
        inserted = self.execute(
            "INSERT INTO outbox (id, namespace, topic, at, event) VALUES (?, ?, ?, ?, ?)",
            (secrets.token_hex(12), namespace, topic, now().isoformat(), body),
        )
        self.last_event = inserted.lastrowid or 0


class _Write:
    """A queued write: its function, the context it was asked in, and where its result goes."""

    __slots__ = ("context", "durable", "error", "frees", "function", "future", "passes", "remember", "result")

    def __init__(
        self, function: Callable[[Transaction], Any], future: asyncio.Future[Any], *, frees: bool, remember: bool,
        passes: bool, durable: bool,
    ) -> None:  # fmt: skip
        self.function = function
        self.passes = passes
        self.durable = durable
        self.remember = remember
        self.future = future
        self.frees = frees
        self.context = contextvars.copy_context()
        self.result: Any = None
        self.error: BaseException | None = None


class _Frozen(Exception):
    """A collection's freeze holds the write."""


class Database:
    """A service's database. Open it with `Database.open`, end it with `close`."""

    def __init__(self, path: Path, reader: sqlite3.Connection, writer: sqlite3.Connection) -> None:
        self.path = path
        self._reader = reader
        self._writer = writer
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name=f"sqlite:{path.name}", daemon=True)
        self._closed = False
        self._epochs = epoch.takes_part(writer.execute)
        self._sweeping = False
        self._forget_at = 0.0
        # Whether events may be committed that are not synced yet; a process before this one may have left some.
        self._unsettled = True
        self._syncs = 0  # durable commits
        self._committed = asyncio.Event()  # since somebody has looked
        self._aside: sqlite3.Connection | None = None
        self._aside_lock = threading.Lock()
        self._ballast = Ballast(path)
        self._spare = self._ballast.make()
        self.on_events: Callable[[], None] | None = None
        # Up to this number, who wrote an event has its result. What an event says happened must be what is answered
        # to who hears it, and a service may keep its state in memory.
        self.events_known = _last_event(reader)
        self._thread.start()

    @classmethod
    async def open(cls, path: Path, migrations: Sequence[str]) -> Database:
        """Open or make the database and bring its schema up to date (one SQL script per version).

        FailedPrecondition: a newer version of the service wrote it. DataLoss: it is damaged; the path is named.
        ResourceExhausted: the disk is full.
        """
        writer, reader = open_database(path, migrations)
        return cls(path, reader, writer)

    def all(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[Any]:
        """The rows of a query, read now."""
        try:
            return self._reader.execute(sql, parameters).fetchall()
        except sqlite3.DatabaseError as e:
            raise translate(e, self.path) from None

    def one(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> Any:
        """The first row of a query, read now, or None."""
        try:
            return self._reader.execute(sql, parameters).fetchone()
        except sqlite3.DatabaseError as e:
            raise translate(e, self.path) from None

    async def write(self, function: Callable[[Transaction], T], *, frees: bool = False, durable: bool = True) -> T:
        """Run `function` in a durable transaction and answer its result.

        frees: a removal, which may use the ballast when the disk is full. ResourceExhausted when it is full.
        durable: False for what is void after a power cut; a process that is killed loses it in no case. Its events
        leave the outbox when they are durable (`settle`).
        """
        return await self._enqueue(function, frees=frees, remember=False, durable=durable)

    async def mutate(self, function: Callable[[Transaction], T], *, frees: bool = False, durable: bool = True) -> T:
        """The write that is a request's whole effect: `function` returns what the endpoint answers.

        If the request in hand carries an idempotency key, the answer is kept under it in the same transaction; a key
        that took effect before raises Replayed, which answers as it did then. frees, durable: as in `write`.
        """
        return await self._enqueue(function, frees=frees, remember=True, durable=durable)

    async def settle(self) -> None:
        """Return when all that was committed before is durable, whatever `durable` it was written with.

        What is written soon after a start is mostly an end, which is durable: a moment is given to that.
        """
        if self._unsettled and not await self._synced_soon():
            await asyncio.to_thread(self._flush_log)

    async def _synced_soon(self) -> bool:
        """Whether a durable commit comes within SETTLE_SECONDS."""
        syncs = self._syncs
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                while self._syncs == syncs:
                    self._committed.clear()
                    await self._committed.wait()
        except TimeoutError:
            return False
        return True

    def _flush_log(self) -> None:
        """Sync the log; what is no longer in it was synced when it went to its place (SQLite's checkpoint)."""
        self._unsettled = False
        try:
            fd = os.open(f"{self.path}-wal", os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as e:
            self._unsettled = True
            raise Internal(f"database {self.path}: its log cannot be synced: {e.strerror}") from None

    async def collect(self, function: Callable[[Transaction], T], *, durable: bool = True) -> T:
        """A write of the garbage collector's: no freeze holds it. durable: False for what is void after a reboot."""
        return await self._enqueue(function, frees=True, remember=False, passes=True, durable=durable)

    def prepare_sweep(self) -> None:
        """Within a write of `collect`, until its epoch ends: many pages change, and go to their places later."""
        if not self._sweeping:
            self._spread(sweeping=True)

    def _spread(self, *, sweeping: bool) -> None:
        for pragma in SWEEP_PRAGMAS if sweeping else REST_PRAGMAS:
            self._writer.execute(f"PRAGMA {pragma}").fetchall()
        self._sweeping = sweeping

    async def checkpoint(self) -> None:
        """Bring what is in the log to its place, as far as nobody is in the way: no write waits for it."""
        await self.aside(lambda connection: connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())

    async def aside(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Read much in a thread, on a connection of its own: neither the event loop nor a write waits for it."""
        return await asyncio.to_thread(self._run_aside, function)

    def _run_aside(self, function: Callable[[sqlite3.Connection], T]) -> T:
        with self._aside_lock:
            if self._closed:
                raise Unavailable(f"database {self.path} is closed")
            try:
                if self._aside is None:
                    self._aside = connect(self.path)
                return function(self._aside)
            except sqlite3.DatabaseError as e:
                raise translate(e, self.path) from None

    async def _enqueue(
        self, function: Callable[[Transaction], T], *, frees: bool, remember: bool, passes: bool = False,
        durable: bool = True,
    ) -> T:  # fmt: skip
        if self._closed:
            raise Unavailable(f"database {self.path} is closed")
        future: asyncio.Future[T] = self._loop.create_future()
        write = _Write(function, future, frees=frees, remember=remember, passes=passes, durable=durable)
        self._queue.put(write)
        return await future

    async def close(self) -> None:
        """End the writer after what is queued. It may be repeated."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._close_aside)
        self._reader.close()
        self._writer.close()

    # ---- the writer's thread

    def _close_aside(self) -> None:
        with self._aside_lock:
            if self._aside is not None:
                self._aside.close()

    def _work(self) -> None:
        waiting: list[_Write] = []
        held, more = False, True
        while more or waiting:
            more = self._gather(waiting, held=held, more=more)
            if held and (passing := [w for w in waiting if w.passes]):
                waiting = [w for w in waiting if not w.passes]
                self._do(passing)
            group = waiting[:GROUP_MAX]
            held = bool(group) and not self._do(group)
            if not held:
                del waiting[:GROUP_MAX]

    def _gather(self, waiting: list[_Write], *, held: bool, more: bool) -> bool:
        """Add what is queued to `waiting`, at least one unless a freeze holds some. Answers whether more may come."""
        if not more:
            time.sleep(HELD_SECONDS if held else 0.0)
            return False
        try:
            if not waiting:
                more = self._take(waiting, None)
            elif held:
                more = self._take(waiting, HELD_SECONDS)
            while more and (held or len(waiting) < GROUP_MAX):
                more = self._take(waiting, 0.0)
        except queue.Empty:
            return True
        return more

    def _take(self, waiting: list[_Write], patience: float | None) -> bool:
        """Add the next that is queued. False when it is the end."""
        write = self._queue.get(timeout=patience) if patience != 0 else self._queue.get_nowait()
        if write is None:
            return False
        waiting.append(write)
        return True

    def _do(self, group: list[_Write]) -> bool:
        """Commit a group and tell its callers. False when a freeze holds it: nothing was done then."""
        try:
            last_event = self._commit(group)
        except _Frozen:
            return False
        except Exception as e:  # nothing may end this thread: every later write would wait for ever
            log.exception("a group of writes to %s failed", self.path)
            last_event = self._fail(group, Internal(f"database {self.path}: {type(e).__name__}"))
        self._loop.call_soon_threadsafe(self._settle, group, last_event)
        return True

    def _commit(self, group: list[_Write]) -> int:
        """Answers the number of its last event; 0 for none."""
        try:
            last_event = self._transact(group)
        except sqlite3.DatabaseError as e:
            if not is_full(e):
                return self._fail(group, translate(e, self.path))
            return self._commit_when_full(group)
        if not self._spare:
            self._spare = self._ballast.make()
        return last_event

    def _commit_when_full(self, group: list[_Write]) -> int:
        """The disk is full: removals run again with the ballast's room, the others are told."""
        frees = [w for w in group if w.frees]
        self._fail([w for w in group if not w.frees], ResourceExhausted(f"no space left for {self.path}"))
        if not frees:
            return 0
        self._ballast.drop()
        self._spare = False
        for pause in (*FULL_PAUSES, None):
            try:
                self._shrink()
                last_event = self._transact(frees)
                self._shrink()
                return last_event
            except sqlite3.DatabaseError as e:
                if pause is None or not is_full(e):
                    return self._fail(frees, translate(e, self.path))
            time.sleep(pause)  # whoever was quicker may give the room back: a backup that does not find enough, say
        return 0

    def _shrink(self) -> None:
        """Give the log's room back: what is in it goes to its place in the database, if that finds room."""
        try:
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.DatabaseError as e:
            log.info("the log of %s could not be emptied: %s", self.path, e)

    @staticmethod
    def _fail(group: list[_Write], error: WherryError) -> int:
        for write in group:
            write.error = type(error)(error.message)
        return 0

    def _transact(self, group: list[_Write]) -> int:
        if any(write.durable for write in group):
            last_event = self._transact_now(group)
            self._unsettled = False  # one log: its sync is that of all before
            self._syncs += 1
            return last_event
        # In the log's order with all others, but not waited for: a flush costs more than all the rest of a freeze.
        self._writer.execute("PRAGMA synchronous=NORMAL")
        try:
            last_event = self._transact_now(group)
            self._unsettled = self._unsettled or last_event > 0
            return last_event
        finally:
            self._writer.execute("PRAGMA synchronous=FULL")

    def _transact_now(self, group: list[_Write]) -> int:
        connection = self._writer
        connection.execute("BEGIN IMMEDIATE")
        try:
            if self._epochs:
                state = epoch.state(connection.execute)
                if state is epoch.State.FROZEN and not all(w.passes for w in group):
                    raise _Frozen
                if state is epoch.State.NONE and self._sweeping:
                    self._spread(sweeping=False)
            transaction = Transaction(connection)
            for write in group:
                if not write.future.cancelled():  # its caller has given up before it began
                    self._run(transaction, write)
            self._forget(connection)
            connection.execute("COMMIT")
            return transaction.last_event
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _forget(self, connection: sqlite3.Connection) -> None:
        """Within a transaction: let go of the answers that nobody asks for any more, if it is time."""
        if (at := time.monotonic()) >= self._forget_at:
            self._forget_at = at + FORGET_SECONDS
            connection.execute("DELETE FROM answers WHERE at < ?", (time.time() - REMEMBER_SECONDS,))

    def _run(self, transaction: Transaction, write: _Write) -> None:
        """One write in its savepoint. Raises only what concerns the whole group: a full or broken database."""
        connection = self._writer
        last_event = transaction.last_event
        connection.execute("SAVEPOINT one")
        try:
            write.result = write.context.run(_once if write.remember else _plainly, transaction, write.function)
            write.error = None
        except sqlite3.Error as e:
            if not connection.in_transaction or is_full(e) or is_broken(e):
                raise
            log.exception("a write to %s failed", self.path)
            write.error = Internal(f"database {self.path}: {e}")
        except BaseException as e:
            write.error = e
        if write.error is not None:
            connection.execute("ROLLBACK TO one")
            transaction.last_event = last_event
        connection.execute("RELEASE one")

    def _settle(self, group: list[_Write], last_event: int) -> None:
        self._committed.set()
        for write in group:
            if write.future.done():
                continue
            if write.error is not None:
                write.future.set_exception(write.error)
            else:
                write.future.set_result(write.result)
        if last_event:
            self.events_known = last_event
            if self.on_events is not None:
                self.on_events()


def _last_event(connection: sqlite3.Connection) -> int:
    """The number of the last that was ever in the outbox."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone()
    return int(row[0]) if row else 0


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
