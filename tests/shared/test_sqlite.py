"""The database of a service: durable groups, remembered answers, and what it says of damage and of a full disk."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grounds import btrfs_disk
from wherry_shared import context, schema, sqlite
from wherry_shared.bus.proxy import fresh_key
from wherry_shared.context import Context, Replayed
from wherry_shared.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from wherry_shared.sqlite import Database, Transaction

SCHEMA = ("CREATE TABLE things (name TEXT PRIMARY KEY, data BLOB NOT NULL DEFAULT '' CHECK (name != 'forbidden'))",)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = await Database.open(tmp_path / "things.db", SCHEMA)
    yield made
    await made.close()


def insert(name: str, data: bytes = b"") -> Any:
    return lambda tx: tx.execute("INSERT INTO things (name, data) VALUES (?, ?)", (name, data)).rowcount


def delete(name: str) -> Any:
    return lambda tx: tx.execute("DELETE FROM things WHERE name = ?", (name,)).rowcount


def names(database: Database) -> list[str]:
    return [row[0] for row in database.all("SELECT name FROM things ORDER BY name")]


class Held:
    """Keeps the writer busy, so that what is written meanwhile becomes one group."""

    def __init__(self, database: Database) -> None:
        self._go = threading.Event()
        self._begun = threading.Event()
        self._task = asyncio.ensure_future(database.write(self._hold))

    def _hold(self, tx: Transaction) -> None:
        self._begun.set()
        assert self._go.wait(10)

    async def __aenter__(self) -> None:
        await asyncio.to_thread(self._begun.wait, 10)

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.sleep(0)  # what was begun inside is queued now
        self._go.set()
        await self._task


# ---- groups


async def test_what_is_written_is_there(database: Database) -> None:
    assert await database.write(insert("a")) == 1
    assert names(database) == ["a"]
    assert database.one("SELECT name FROM things WHERE name = ?", ("b",)) is None


async def test_writes_that_wait_share_a_transaction(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    transact = Database._transact
    monkeypatch.setattr(Database, "_transact", lambda self, group: groups.append(len(group)) or transact(self, group))  # type: ignore[func-returns-value]
    async with Held(database):
        writes = [asyncio.ensure_future(database.write(insert(f"{n:03}"))) for n in range(100)]
    await asyncio.gather(*writes)
    assert groups == [1, sqlite.GROUP_MAX, 100 - sqlite.GROUP_MAX]
    assert len(names(database)) == 100


FAILURES = {
    "its own error": (lambda tx: _raise(AlreadyExists("taken")), AlreadyExists),
    "a constraint": (insert("forbidden"), Internal),
    "a bug": (lambda tx: _raise(ValueError("bug")), ValueError),
    "bad SQL": (lambda tx: tx.execute("INSERT INTO nothing VALUES (1)"), Internal),
    "too few parameters": (lambda tx: tx.execute("INSERT INTO things (name) VALUES (?)", ()), Internal),
    "a type that none is": (insert(object()), Internal),  # type: ignore[arg-type]
    "a text that none is": (insert("\ud800"), UnicodeEncodeError),
    "a bad event": (lambda tx: tx.publish("no-slash/*", {}, namespace="default"), InvalidArgument),
    "an event of nowhere": (lambda tx: tx.publish("/a/b", {}), FailedPrecondition),
    "an event of no value": (lambda tx: tx.publish("/a/b", {"x": object()}, namespace="default"), TypeError),
}


def _raise(e: Exception) -> None:
    raise e


@pytest.mark.parametrize("kind", FAILURES)
async def test_one_failing_write_does_not_hurt_the_others(database: Database, kind: str) -> None:
    fails, error = FAILURES[kind]

    def both(tx: Transaction) -> None:
        insert("half")(tx)
        fails(tx)

    async with Held(database):
        before = asyncio.ensure_future(database.write(insert("before")))
        bad = asyncio.ensure_future(database.write(both))
        after = asyncio.ensure_future(database.write(insert("after")))
    assert (await before, await after) == (1, 1)
    with pytest.raises(error):
        await bad
    assert names(database) == ["after", "before"]
    assert await database.write(insert("next")) == 1


async def test_a_write_whose_caller_has_gone_is_not_begun(database: Database) -> None:
    async with Held(database):
        gone = asyncio.ensure_future(database.write(insert("gone")))
        stays = asyncio.ensure_future(database.write(insert("stays")))
        await asyncio.sleep(0)
        gone.cancel()
    await stays
    assert names(database) == ["stays"]


async def test_nothing_ends_the_writer(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, group: Any) -> int:
        raise OSError("something else")

    with monkeypatch.context() as m:
        m.setattr(Database, "_transact", broken)
        with pytest.raises(Internal, match="OSError"):
            await database.write(insert("a"))
    assert await database.write(insert("b")) == 1


async def test_after_the_end(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "things.db", SCHEMA)
    last = asyncio.ensure_future(database.write(insert("last")))
    await asyncio.sleep(0)
    await database.close()
    await database.close()
    assert await last == 1
    with pytest.raises(Unavailable, match="closed"):
        await database.write(insert("a"))
    again = await Database.open(tmp_path / "things.db", SCHEMA)
    assert names(again) == ["last"]
    await again.close()


# ---- answers under a key


def request(key: str) -> Context:
    return Context(namespace="default", key=key, encode=lambda value: json.dumps(value).encode())


async def test_a_key_has_one_effect(database: Database) -> None:
    async def call(key: str, name: str) -> Any:
        context.enter(request(key))
        return await database.mutate(insert(name))

    assert await asyncio.create_task(call("k1", "a")) == 1
    with pytest.raises(Replayed) as replayed:
        await asyncio.create_task(call("k1", "b"))
    assert replayed.value.reply == b"1"
    with pytest.raises(Internal):  # an effect that failed is none: the key is still free
        await asyncio.create_task(call("k2", "a"))
    assert await asyncio.create_task(call("k2", "c")) == 1
    assert names(database) == ["a", "c"]


async def test_one_key_twice_in_a_group(database: Database) -> None:
    async def call() -> Any:
        context.enter(request("k"))
        return await database.mutate(insert("a"))

    async with Held(database):
        calls = [asyncio.create_task(call()) for _ in range(3)]
        await asyncio.sleep(0)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [r if isinstance(r, int) else r.reply for r in results] == [1, b"1", b"1"]  # type: ignore[union-attr]


async def test_answers_are_forgotten_in_time(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async def call(key: str) -> Any:
        context.enter(request(key))
        return await database.mutate(lambda tx: None)

    await asyncio.create_task(call("old"))
    monkeypatch.setattr(sqlite, "REMEMBER_SECONDS", -1)
    await asyncio.sleep(sqlite.FORGET_SECONDS)
    await asyncio.create_task(call("new"))
    assert database.all("SELECT key FROM answers") == []


async def test_answers_of_one_moment_lie_together(database: Database, tmp_path: Path) -> None:
    """Keys that begin with the time: a group writes the pages of its own answers, not one for each of them."""

    async def call() -> None:
        context.enter(request(f"admin/default/create/{fresh_key()}"))
        await database.mutate(lambda tx: "x" * 200)

    for _ in range(40):
        await asyncio.gather(*(asyncio.create_task(call()) for _ in range(sqlite.GROUP_MAX)))
    await database.aside(lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
    async with Held(database):
        calls = [asyncio.create_task(call()) for _ in range(32)]
        await asyncio.sleep(0)
    await asyncio.gather(*calls)
    pages = (tmp_path / "things.db-wal").stat().st_size // 4096
    assert pages <= 20  # 58 with keys of no order


# ---- events in the same transaction


async def test_an_event_is_there_with_its_change_and_only_then(database: Database) -> None:
    def change(fail: bool) -> Any:
        def write(tx: Transaction) -> None:
            insert("a")(tx)
            tx.publish("/things/create", {"name": "ä"}, namespace="k8s.io")
            if fail:
                raise AlreadyExists("no")

        return write

    told: list[int] = []
    database.on_events = lambda: told.append(1)
    with pytest.raises(AlreadyExists):
        await database.write(change(True))
    assert database.all("SELECT * FROM outbox") == []
    await database.write(change(False))
    ((_, event_id, namespace, topic, _, event),) = database.all("SELECT * FROM outbox")
    assert (namespace, topic, json.loads(event), len(event_id)) == ("k8s.io", "/things/create", {"name": "ä"}, 24)
    assert told == [1]


async def test_an_event_that_could_never_leave_is_refused(database: Database) -> None:
    for topic, namespace, event in (
        ("/a/b", "default", {"x": "y" * sqlite.EVENT_BYTES_MAX}),
        ("/a/b", "default", {"x": "ü" * (sqlite.EVENT_BYTES_MAX // 2)}),
        ("/a/*", "default", {}), ("", "default", {}), ("/", "default", {}), ("/a//b", "default", {}),
        ("/a.b/c", "a b", {}), ("/a", "*", {}),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument):
            await database.write(lambda tx, t=topic, n=namespace, e=event: tx.publish(t, e, namespace=n))  # type: ignore[misc]
    assert database.all("SELECT * FROM outbox") == []


# ---- the schema


async def test_migrations_go_on_where_they_stopped(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "things.db"
    trigger = """
    CREATE TABLE log (text TEXT);
    CREATE TRIGGER noted AFTER INSERT ON things BEGIN
        INSERT INTO log VALUES ('a; b'); INSERT INTO log VALUES (new.name);
    END
    """
    for migrations in (SCHEMA, (*SCHEMA, trigger), (*SCHEMA, trigger)):
        database = await Database.open(path, migrations)
        version = database.one("PRAGMA user_version")[0]
        assert version == len(migrations)
        await database.close()
    database = await Database.open(path, (*SCHEMA, trigger))
    await database.write(insert("x"))
    assert [r[0] for r in database.all("SELECT text FROM log")] == ["a; b", "x"]
    await database.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "things.db"
    await (await Database.open(path, (*SCHEMA, "CREATE TABLE more (a)"))).close()
    before = path.read_bytes()
    with pytest.raises(FailedPrecondition) as refused:
        await Database.open(path, SCHEMA)
    assert str(refused.value) == f"{path} has schema 2, and this version knows only 1: run the newer one"
    assert path.read_bytes() == before


async def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "things.db"
    await (await Database.open(path, SCHEMA)).close()
    with pytest.raises(Internal, match="syntax error"):
        await Database.open(path, (*SCHEMA, "CREATE TABLE half (a); CREATE NONSENSE"))
    database = await Database.open(path, SCHEMA)
    assert database.all("SELECT name FROM sqlite_master WHERE name = 'half'") == []
    await database.close()


# ---- damage


async def filled(path: Path) -> bytes:
    database = await Database.open(path, SCHEMA)
    await database.write(lambda tx: [insert(f"{n:04}", os.urandom(700))(tx) for n in range(200)])
    await database.close()
    return path.read_bytes()


def noise(whole: bytes, page: int) -> bytes:
    return whole[: page * 4096] + os.urandom(4096) + whole[(page + 1) * 4096 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "cut off at a page": lambda whole: whole[:-4096],
    "emptied": lambda whole: b"",
    "another file": lambda whole: b"Once upon a time " * 1000,
    "its header gone": lambda whole: bytes(100) + whole[100:],
    "all zero": lambda whole: bytes(len(whole)),
    "the schema's page": lambda whole: whole[:100] + os.urandom(3996) + whole[4096:],
    "a page of a table": lambda whole: noise(whole, len(whole) // 4096 - 3),
}


@pytest.mark.parametrize("kind", DAMAGE)
async def test_a_damaged_database_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "things.db"
    path.write_bytes(DAMAGE[kind](await filled(path)))
    before = path.read_bytes()
    with pytest.raises(DataLoss) as refused:
        await Database.open(path, SCHEMA)
    assert str(path) in str(refused.value)
    assert "restore it from a backup" in str(refused.value)
    assert path.read_bytes() == before


async def test_a_database_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "things.db"
    await filled(path)
    path.unlink()
    with pytest.raises(DataLoss, match=r"move it away with its -wal and its \.ballast to start empty"):
        await Database.open(path, SCHEMA)
    path.with_name("things.db.ballast").unlink()
    await (await Database.open(path, SCHEMA)).close()


async def test_damage_under_a_running_service(tmp_path: Path) -> None:
    path = tmp_path / "things.db"
    whole = await filled(path)
    database = await Database.open(path, SCHEMA)
    with path.open("r+b") as f:
        f.seek(4096)
        f.write(os.urandom(len(whole) - 4096))
    with pytest.raises(DataLoss, match=r"things\.db is damaged"):
        database.all("SELECT * FROM things ORDER BY data")
    await database.close()


async def test_another_process_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "things.db"
    database = await Database.open(path, SCHEMA)
    database._writer.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked by another process"):
        await database.write(insert("a"))
    other.execute("ROLLBACK")
    assert await database.write(insert("a")) == 1
    other.close()
    await database.close()


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from wherry_shared.sqlite import Database

async def main():
    database = await Database.open(Path(sys.argv[1]), ("CREATE TABLE things (name TEXT PRIMARY KEY, data BLOB)",))
    for n in range(10_000):
        await database.write(lambda tx: tx.execute("INSERT INTO things VALUES (?, '')", (f"{n:05}",)).rowcount)
        print(n, flush=True)

asyncio.run(main())
"""


def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "things.db"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    answered = -1
    while answered < 50:
        answered = int(process.stdout.readline())
    process.kill()
    answered = int(([str(answered).encode(), *process.stdout.read().split()])[-1])
    process.wait()
    process.stdout.close()

    async def count() -> int:
        database = await Database.open(path, SCHEMA)
        found: int = database.one("SELECT count(*) FROM things")[0]
        await database.close()
        return found

    assert answered + 1 <= asyncio.run(count()) <= answered + 2


# ---- a full disk


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        done = subprocess.run(["umount", str(place)])
        if done.returncode:  # something there is still open, which is a mistake
            subprocess.run(["umount", "-l", str(place)], check=True)
        assert done.returncode == 0


def fill(place: Path, leave: int = 0) -> None:
    """Take all the room but `leave` bytes."""
    room = os.statvfs(place)
    size = room.f_bavail * room.f_frsize - leave
    if size > 0:
        with (place / f"filler-{size}").open("wb") as f:
            os.posix_fallocate(f.fileno(), 0, size)


def empty(place: Path) -> None:
    for path in place.glob("filler-*"):
        path.unlink()


@needs_root
async def test_a_full_disk(small: Path) -> None:
    path = small / "things.db"
    database = await Database.open(path, SCHEMA)
    for n in range(20):
        await database.write(insert(f"{n:02}", os.urandom(2000)))
    fill(small)
    ballast = path.with_name("things.db.ballast")
    assert ballast.stat().st_size == schema.BALLAST_BYTES
    with pytest.raises(ResourceExhausted, match=r"no space left for .*things\.db"):
        for n in range(10_000):  # the log may have some room of its own
            await database.write(insert(f"x{n}", os.urandom(100_000)))
    assert ballast.exists()
    assert len(names(database)) >= 20  # reading goes on
    for n in range(20):
        assert await database.write(delete(f"{n:02}"), frees=True) == 1
    assert "00" not in names(database)
    empty(small)
    assert await database.write(insert("again", os.urandom(100_000))) == 1
    assert ballast.stat().st_size == schema.BALLAST_BYTES  # put by again
    await database.close()
    again = await Database.open(path, SCHEMA)
    assert "again" in names(again)
    await again.close()


@needs_root
async def test_removals_go_on_for_long_on_a_full_disk(small: Path) -> None:
    """The log of the removals must not eat the room that the ballast gave."""
    path = small / "things.db"
    database = await Database.open(path, SCHEMA)
    await database.write(lambda tx: [insert(f"{n:04}", os.urandom(1500))(tx) for n in range(400)])
    fill(small)
    for n in range(400):
        assert await database.write(delete(f"{n:04}"), frees=True) == 1
    assert names(database) == []
    await database.close()


@needs_root
async def test_in_a_group_on_a_full_disk_only_removals_pass(small: Path) -> None:
    path = small / "things.db"
    database = await Database.open(path, SCHEMA)
    await database.write(insert("old", os.urandom(1000)))
    fill(small)
    async with Held(database):
        big = asyncio.ensure_future(database.write(insert("big", os.urandom(2_000_000))))
        gone = asyncio.ensure_future(database.write(delete("old"), frees=True))
    with pytest.raises(ResourceExhausted):
        await big
    assert await gone == 1
    assert names(database) == []
    await database.close()


@needs_root
async def test_a_service_starts_on_a_full_disk(small: Path) -> None:
    """To be able to remove something there."""
    path = small / "things.db"
    database = await Database.open(path, SCHEMA)
    await database.write(lambda tx: [insert(f"{n:02}", os.urandom(2000))(tx) for n in range(50)])
    await database.close()
    fill(small)
    database = await Database.open(path, SCHEMA)
    for n in range(50):
        assert await database.write(delete(f"{n:02}"), frees=True) == 1
    await database.close()


@needs_root
async def test_no_room_at_the_first_start(small: Path) -> None:
    fill(small)
    with pytest.raises(ResourceExhausted, match=r"no space left for .*things\.db"):
        await Database.open(small / "things.db", SCHEMA)
    empty(small)
    await (await Database.open(small / "things.db", SCHEMA)).close()


# Fills the disk, so that what is written back of the mapped index finds no new place for its next change.
ON_A_FULL_DISK = """
import asyncio, os, sys
from contextlib import suppress
from pathlib import Path
from wherry_shared.errors import ResourceExhausted
from wherry_shared.sqlite import Database

def fill(path):
    with suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096):
            with suppress(OSError):
                while True:
                    file.write(b"x" * size)
    os.sync()

async def main(disk):
    database = await Database.open(disk / "things.db", ("CREATE TABLE things (data BLOB)",))
    insert = lambda tx: tx.execute("INSERT INTO things VALUES (?)", (os.urandom(3000),)).rowcount
    for _ in range(100):
        await database.write(insert)
    for number in range(2):
        fill(disk / f"filler{number}")
    refused = 0
    for _ in range(50):
        try:
            await database.write(insert)
        except ResourceExhausted:
            refused += 1
    print(refused > 0, database.one("SELECT count(*) >= 100 FROM things")[0])
    await database.close()

asyncio.run(main(Path(sys.argv[1])))
"""


@needs_root
def test_a_full_btrfs_costs_writes_and_not_the_process(tmp_path: Path) -> None:
    try:
        with btrfs_disk(tmp_path / "disk", 128 << 20) as disk:
            command = [sys.executable, "-c", ON_A_FULL_DISK, str(disk)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except OSError as e:
        pytest.skip(str(e))
    assert (done.returncode, done.stdout) == (0, "True 1\n"), done.stderr
