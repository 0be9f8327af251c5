"""A second copy of a service's database, kept beside it, for when the first is found damaged.

A copy is made from time to time when something has changed, checked, and given its name only when it is whole; its time
says when it was last seen to be as the database is. It is put back when the service's setting `restore` is `backup`,
and only over a database that is damaged or gone: what was changed after the copy was made is lost then, and nobody but
the operator may decide that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from .errors import DataLoss
from .files import TEMPORARY, sync_directory
from .sqlite import Database

log = logging.getLogger("wherry.backup")

INTERVAL = 60.0
"""Seconds between two copies at least; a database whose copy takes long is copied less often."""
_SHARE = 0.01  # of the time, at most, that is spent copying
_WAL_HEADER = 32
_WAL_MAGIC = (0x377F0682, 0x377F0683)  # sqlite.org/fileformat2.html, "The Write-Ahead Log"


def backup_of(path: Path) -> Path:
    """Where the copy of a database lies."""
    return path.with_name(path.name + ".backup")


async def open_database(path: Path, migrations: Sequence[str], *, restore: bool) -> Database:
    """Open a database; restore: from its backup, if it is damaged or gone.

    Raises what `Database.open` does; a DataLoss says which backup there is and how to go on from it.
    """
    try:
        check_log(path)
        return await Database.open(path, migrations)
    except DataLoss as e:
        copy = backup_of(path)
        try:
            made = datetime.fromtimestamp(copy.stat().st_mtime, UTC).isoformat(timespec="seconds")
        except FileNotFoundError:
            raise e from None
        if not restore:
            raise DataLoss(
                f"{e.message}. Its backup of {made} is put in its place with --set restore=backup; what was changed "
                "after that is lost then"
            ) from None
        log.error("%s. It is put aside, and its backup of %s takes its place", e.message, made)
    await asyncio.to_thread(_put_back, path)
    return await Database.open(path, migrations)


def check_log(path: Path) -> None:
    """DataLoss when the write-ahead log was overwritten: SQLite would take it for an empty one, and say nothing."""
    log_path = path.with_name(path.name + "-wal")
    try:
        with log_path.open("rb") as file:
            head = file.read(_WAL_HEADER)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return
    if size > _WAL_HEADER and int.from_bytes(head[:4], "big") not in _WAL_MAGIC:
        raise DataLoss(f"database {path} is damaged: its log {log_path.name} does not begin as one")


def _put_back(path: Path) -> None:
    """The damaged database and its log go aside under one name, and the backup's bytes take its place."""
    aside = f".damaged-{time.time_ns()}"
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{path}{aside}{suffix}")
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    shutil.copyfile(backup_of(path), temporary)
    _sync(temporary)
    os.rename(temporary, path)
    sync_directory(path.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Backup:
    """Keeps the copy of one database. Start it when the database is open, stop it before that is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._seen = -1
        self._connection: sqlite3.Connection | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def stop(self) -> None:
        """Make a last copy, if anything has changed."""
        self._stopping.set()
        if self._task is not None:
            await self._task

    async def _keep(self) -> None:
        pause = INTERVAL if backup_of(self._path).exists() else 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            started = time.monotonic()
            await asyncio.to_thread(self.copy)
            pause = max(INTERVAL, (time.monotonic() - started) / _SHARE)
            if self._stopping.is_set():
                await asyncio.to_thread(self.close)
                return

    def copy(self) -> None:
        """Copy the database if it has changed since the last time. What fails is told, and the old copy stays."""
        temporary = self._path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
        try:
            self._copy(temporary)
        except (sqlite3.Error, OSError) as e:
            log.error("%s is not backed up: %s", self._path, e)
        finally:
            for suffix in ("", "-wal", "-shm", "-journal"):
                with suppress(OSError):
                    os.unlink(f"{temporary}{suffix}")

    def _copy(self, temporary: Path) -> None:
        if self._connection is None:
            self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        version: int = self._connection.execute("PRAGMA data_version").fetchone()[0]
        if version == self._seen:
            with suppress(FileNotFoundError):
                os.utime(backup_of(self._path))  # it is as of now, too
                return
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        copy = sqlite3.connect(temporary, isolation_level=None)
        try:
            self._connection.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # the copy is one file
            found: str = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
        finally:
            copy.close()
        if found != "ok":
            raise sqlite3.DatabaseError(f"it is damaged ({found.splitlines()[-1]})")
        _sync(temporary)
        os.rename(temporary, backup_of(self._path))
        sync_directory(self._path.parent)
        self._seen = version

    def close(self) -> None:
        """Let go of the database; the next copy opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
