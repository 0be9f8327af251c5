"""The second copy of a database: made when something changed, never over a good one, put back only when told to."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from housebus import PATIENCE
from wherry_shared import backup
from wherry_shared.backup import Backup, backup_of, open_database
from wherry_shared.errors import DataLoss
from wherry_shared.sqlite import Database

MIGRATIONS = ("CREATE TABLE things (name TEXT PRIMARY KEY, filler TEXT NOT NULL)",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "service/metadata.db"


def copy(path: Path) -> None:
    """One copy made now. Nothing stays open, so that the last who closes the database empties its log."""
    keeper = Backup(path)
    keeper.copy()
    keeper.close()


async def add(database: Database, *names: str) -> None:
    for name in names:
        await database.write(lambda tx, name=name: tx.execute("INSERT INTO things VALUES (?, ?)", (name, "x" * 500)))  # type: ignore[misc]


def names(database: Database) -> list[str]:
    return [name for (name,) in database.all("SELECT name FROM things ORDER BY name")]


async def filled(path: Path) -> list[str]:
    """A database of many pages with a backup that lacks the last thing."""
    database = await Database.open(path, MIGRATIONS)
    known = [f"thing{i:03}" for i in range(200)]
    await add(database, *known)
    copy(path)
    await add(database, "later")
    await database.close()
    return known


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    """A random page of the things, which fill nearly all of it."""
    with path.open("r+b") as file:
        file.seek(4096 * 12)
        file.write(random.Random(1).randbytes(4096))


def zero_log(path: Path) -> None:
    """With a log as a killed service leaves it."""
    log = path.with_name(path.name + "-wal")
    log.write_bytes(b"\0" * 100_000)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    os.truncate(path, 0)


DAMAGE = [truncate, overwrite, zero_log, remove, empty]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
async def test_a_damaged_database_is_refused_and_restored_when_told(
    path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    known = await filled(path)
    damage(path)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir() if not p.name.endswith("-shm")}
    for _ in range(2):
        with pytest.raises(DataLoss, match=r"metadata\.db .*backup of 20.*restore=backup"):
            await open_database(path, MIGRATIONS, restore=False)
    after = {p.name: p.read_bytes() for p in path.parent.iterdir() if not p.name.endswith("-shm")}
    assert after == before, "a refusal changes nothing"
    database = await open_database(path, MIGRATIONS, restore=True)
    try:
        assert names(database) == known
        assert "its backup of" in caplog.text and str(path) in caplog.text
        await add(database, "new")
    finally:
        await database.close()
    if damage is not remove:
        assert any(".damaged-" in p.name for p in path.parent.iterdir()), "what was damaged is kept for whoever can"
    database = await open_database(path, MIGRATIONS, restore=False)
    assert names(database) == ["new", *known]
    await database.close()


async def test_without_a_backup_the_refusal_says_what_it_said(path: Path) -> None:
    await filled(path)
    backup_of(path).unlink()
    truncate(path)
    for restore in (False, True):
        with pytest.raises(DataLoss, match=r"metadata\.db"):
            await open_database(path, MIGRATIONS, restore=restore)


async def test_a_sound_database_is_never_replaced(path: Path) -> None:
    known = await filled(path)
    database = await open_database(path, MIGRATIONS, restore=True)
    assert names(database) == ["later", *known]
    await database.close()


async def test_a_log_in_use_is_no_damage(path: Path) -> None:
    database = await Database.open(path, MIGRATIONS)
    await add(database, "one")
    log = path.with_name(path.name + "-wal").read_bytes()
    assert log
    backup.check_log(path)
    await database.close()
    path.with_name(path.name + "-wal").write_bytes(b"")
    backup.check_log(path)
    await (await open_database(path, MIGRATIONS, restore=False)).close()


async def test_a_damaged_database_does_not_take_its_backup_along(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await filled(path)
    good = backup_of(path).read_bytes()
    overwrite(path)
    copy(path)
    assert backup_of(path).read_bytes() == good and "not backed up" in caplog.text
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".tmp-")]


async def test_it_copies_what_has_changed_and_at_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "INTERVAL", 0.01)
    copies: list[int] = []
    real = os.rename
    monkeypatch.setattr(backup.os, "rename", lambda a, b: (real(a, b), copies.append(1)))
    database = await Database.open(path, MIGRATIONS)
    keeper = Backup(path)
    keeper.start()

    async def copied(count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(copies) < count:
                await asyncio.sleep(0.01)

    await copied(1)  # the first at once: a young database has none
    await add(database, "one")
    await copied(2)
    os.utime(backup_of(path), (0, 0))
    async with asyncio.timeout(20):
        while not backup_of(path).stat().st_mtime:  # it is looked at, and as of now
            await asyncio.sleep(0.01)
    assert len(copies) == 2, "nothing has changed"
    monkeypatch.setattr(backup, "INTERVAL", 60.0)
    await add(database, "two")
    await keeper.stop()
    await database.close()
    kept = sqlite3.connect(backup_of(path))
    assert [n for (n,) in kept.execute("SELECT name FROM things")] == ["one", "two"]
    kept.close()
    assert backup_of(path).stat().st_mode & 0o777 == 0o600


async def test_a_full_disk_leaves_the_old_copy(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await filled(path)
    good = backup_of(path).read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup.os, "fsync", full)
    copy(path)
    assert backup_of(path).read_bytes() == good and "No space left" in caplog.text
    monkeypatch.undo()
    copy(path)
    assert backup_of(path).read_bytes() != good
