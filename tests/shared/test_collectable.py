"""Epochs in a database: the journal, the freeze, the sweep; and how references are read and travel."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from housebus import PATIENCE
from wherry_shared import epoch as epochs
from wherry_shared.api.gc import ImageCollection
from wherry_shared.catalog import SCHEMA
from wherry_shared.collectable import Collection, Records, migration
from wherry_shared.errors import FailedPrecondition, Unavailable
from wherry_shared.references import (
    CONTENT,
    IMAGES,
    PAGE_BYTES,
    Node,
    Page,
    decode,
    encode_dead,
    expires_at,
    nodes,
    parse_duration,
    parse_time,
)
from wherry_shared.sqlite import Database, Transaction

MIGRATIONS = (SCHEMA, migration(IMAGES))
LONG = 60.0


class Part(Collection, ImageCollection):
    def __init__(self, database: Database) -> None:
        super().__init__(database, [Records(IMAGES, lambda node, document: None)])


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = await Database.open(tmp_path / "metadata.db", MIGRATIONS)
    yield made
    await made.close()


@pytest.fixture
def part(database: Database) -> Part:
    return Part(database)


async def put(database: Database, *keys: str) -> None:
    def write(tx: Transaction) -> None:
        for key in keys:
            tx.execute("INSERT INTO records VALUES ('ns', ?, 'x') ON CONFLICT DO UPDATE SET record = 'y'", (key,))

    await database.mutate(write)


async def drop(database: Database, key: str) -> None:
    await database.mutate(lambda tx: tx.execute("DELETE FROM records WHERE key = ?", (key,)).rowcount)


def dead(*keys: str) -> bytes:
    return encode_dead([(IMAGES, "ns", [*keys])])


async def changes(part: Part, after: int = 0) -> dict[str, bool]:
    """What the journal names: whether it is there."""
    _, more, groups = decode(await part.changed("e", after))
    assert not more
    return {node.key: not node.gone for node in nodes(groups)}


async def keys(part: Part) -> list[str]:
    found, after = [], b""
    while True:
        after, groups = decode(await part.nodes(after))
        found += [node.key for node in nodes(groups)]
        if not after:
            return found


# ---- the journal


async def test_the_journal_has_what_changed_since_the_beginning(database: Database, part: Part) -> None:
    await put(database, "a", "b", "c")
    await part.begin("e", LONG)
    assert await changes(part) == {}
    await put(database, "b", "d")
    await drop(database, "c")
    assert await changes(part) == {"b": True, "d": True, "c": False}
    await part.end("e")
    await put(database, "a")
    with pytest.raises(FailedPrecondition, match="not under way"):
        await part.changed("e")
    await part.begin("e", LONG)
    assert await changes(part) == {}


async def test_a_change_comes_again_behind_what_was_read(database: Database, part: Part) -> None:
    await part.begin("e", LONG)
    await put(database, "a", "b")
    last, _, _ = decode(await part.changed("e"))
    assert await changes(part, last) == {}
    await put(database, "b")
    assert await changes(part, last) == {"b": True}
    assert await changes(part) == {"a": True, "b": True}


async def test_many_changes_are_told_in_pages(database: Database, part: Part) -> None:
    await part.begin("e", LONG)
    await put(database, *(f"k{n}" for n in range(5000)))
    found, last, more = set(), 0, True
    while more:
        last, more, groups = decode(await part.changed("e", last))
        found |= {node.key for node in nodes(groups)}
    assert len(found) == 5000


async def test_an_epoch_lapses_and_its_journal_ends(database: Database, part: Part) -> None:
    await part.begin("e", 0.05)
    await asyncio.sleep(0.06)
    with pytest.raises(FailedPrecondition):
        await part.changed("e")
    await put(database, "a")  # ends it
    await put(database, "b")
    assert database.one("SELECT count(*) FROM gc_epoch")[0] == 0
    assert database.one("SELECT count(*) FROM gc_journal")[0] == 0


async def test_an_epoch_of_an_earlier_boot_is_over(
    database: Database, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    await part.begin("e", LONG)
    await part.freeze("e", LONG)
    monkeypatch.setattr(epochs, "boot_id", lambda: "another")
    with pytest.raises(FailedPrecondition):
        await part.sweep("e", dead("a"))
    async with asyncio.timeout(PATIENCE):
        await put(database, "a")


async def test_a_second_collection_ends_the_first(database: Database, part: Part) -> None:
    await put(database, "a")
    await part.begin("e", LONG)
    await part.freeze("e", LONG)
    await part.begin("f", LONG)
    async with asyncio.timeout(PATIENCE):
        await put(database, "b")
    for call in (part.freeze("e", LONG), part.changed("e"), part.sweep("e", dead("a"))):
        with pytest.raises(FailedPrecondition):
            await call
    await part.end("e")
    await part.thaw("e")
    assert await part.changed("f")


# ---- the freeze


async def test_a_freeze_holds_mutations_and_no_reads(database: Database, part: Part) -> None:
    await put(database, "a")
    await part.begin("e", LONG)
    await part.freeze("e", LONG)
    writes = [asyncio.create_task(put(database, f"k{n}")) for n in range(200)]
    await asyncio.sleep(0.05)
    assert not any(w.done() for w in writes)
    assert await keys(part) == ["a"]
    assert database.one("SELECT count(*) FROM records")[0] == 1
    assert await changes(part) == {}
    assert await part.sweep("e", dead("a")) == 1
    await part.thaw("e")
    await asyncio.gather(*writes)
    assert len(await keys(part)) == 200
    assert len(await changes(part)) == 200, "what the sweep removed is no change"


async def test_a_freeze_lapses_by_itself(database: Database, part: Part) -> None:
    await part.begin("e", LONG)
    frozen = epochs.clock()
    await part.freeze("e", 0.2)
    async with asyncio.timeout(PATIENCE):
        await put(database, "a")
    assert epochs.clock() - frozen >= 0.2
    with pytest.raises(FailedPrecondition, match="over"):
        await part.sweep("e", dead("a"))
    assert await keys(part) == ["a"]


async def test_who_gives_up_in_a_freeze_has_done_nothing(database: Database, part: Part) -> None:
    await part.begin("e", LONG)
    await part.freeze("e", LONG)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await put(database, "late")
    await part.thaw("e")
    await put(database, "a")
    assert await keys(part) == ["a"]


async def test_a_freeze_holds_the_other_processes_too(tmp_path: Path, database: Database, part: Part) -> None:
    other = await Database.open(tmp_path / "metadata.db", MIGRATIONS)
    await part.begin("e", LONG)
    await part.freeze("e", LONG)
    write = asyncio.create_task(put(other, "a"))
    await asyncio.sleep(0.05)
    assert not write.done()
    assert await Part(other).sweep("e", dead("b")) == 0  # any replica may be asked
    await Part(other).thaw("e")
    await write
    assert await changes(part) == {"a": True}
    await other.close()


async def test_a_database_that_is_closed_in_a_freeze_ends(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "metadata.db", MIGRATIONS)
    part = Part(database)
    await part.begin("e", LONG)
    await part.freeze("e", 0.3)
    write = asyncio.create_task(put(database, "a"))
    await asyncio.sleep(0.01)
    await database.close()
    await write
    with pytest.raises(Unavailable):
        await part.nodes()


# ---- the sweep


async def test_a_sweep_needs_a_freeze_with_half_of_it_left(database: Database, part: Part) -> None:
    await put(database, "a")
    await part.begin("e", LONG)
    with pytest.raises(FailedPrecondition):
        await part.sweep("e", dead("a"))
    await part.freeze("e", 0.2)
    await asyncio.sleep(0.11)
    with pytest.raises(FailedPrecondition):
        await part.sweep("e", dead("a"))
    assert await keys(part) == ["a"]


async def test_a_sweep_that_takes_too_long_removes_nothing(
    database: Database, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(database, "a")
    await part.begin("e", LONG)
    await part.freeze("e", LONG)
    real, asked = epochs.clock, iter((0.0, 0.0, 100.0, 100.0, 100.0, 100.0))
    monkeypatch.setattr(epochs, "clock", lambda: real() + next(asked, 0.0))
    with pytest.raises(FailedPrecondition):
        await part.sweep("e", dead("a"))
    monkeypatch.undo()
    assert await keys(part) == ["a"]
    row = database.one("SELECT sweeping FROM gc_epoch")
    assert row is None or row[0] == 0


async def test_deletions_are_noted_and_the_collectors_own_are_not(database: Database, part: Part) -> None:
    assert not (await part.activity()).deletions
    await put(database, "a", "b")
    assert not (await part.activity()).deletions
    await drop(database, "a")
    assert (await part.activity()).deletions
    await part.begin("e", LONG)
    assert not (await part.activity()).deletions
    await part.freeze("e", LONG)
    await part.sweep("e", dead("b"))
    await part.thaw("e")
    assert not (await part.activity()).deletions


async def test_an_older_database_learns_it(tmp_path: Path) -> None:
    old = await Database.open(tmp_path / "metadata.db", MIGRATIONS[:1])
    await put(old, "a")
    await old.close()
    new = await Database.open(tmp_path / "metadata.db", MIGRATIONS)
    part = Part(new)
    await part.begin("e", LONG)
    await put(new, "b")
    assert await changes(part) == {"b": True}
    assert await keys(part) == ["a", "b"]
    await new.close()
    with sqlite3.connect(tmp_path / "metadata.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


# ---- references


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("24h", 86400.0), ("1h30m", 5400.0), ("1.5s", 1.5), ("300ms", 0.3), ("-2m", -120.0), ("0", 0.0), ("", None),
        ("1", None), ("h", None), ("1 h", None), ("1d", None), ("1hx", None),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == pytest.approx(seconds) if seconds is not None else parse_duration(text) is None


@pytest.mark.parametrize("text", ["", "tomorrow", "2001-01-01", "2001-13-01T00:00:00Z", "20010101T000000Z"])
def test_what_is_no_time_expires_never(text: str) -> None:
    assert parse_time(text) is None
    assert expires_at({"containerd.io/gc.expire": text}) is None


def test_nodes_travel_whole() -> None:
    node = Node(
        "snapshots/overlay", "ns", "k", root=True, until=1.5, flat=True, hard=[(CONTENT, "a")], soft=[("x", "b")],
        back=[("z", "d")], conditions=[("snapshots/o", "k", "<", 2.0)], used=[3.0],
    )  # fmt: skip
    plain, gone = Node(CONTENT, "ns", "p"), Node(CONTENT, "ns", "g", gone=True)
    page = Page()
    assert all(page.add(n) for n in (node, plain, gone))
    head, more, groups = decode(page.encode(7, False))
    assert (head, more, list(nodes(groups))) == (7, False, [node, plain, gone])


def test_a_page_is_full_before_it_is_too_large() -> None:
    page = Page()
    many: list[Any] = [("content", "x" * 64)] * 50
    count = 0
    while page.add(Node(CONTENT, "ns", f"k{count}", soft=many)):
        count += 1
    assert count > 50
    assert PAGE_BYTES // 2 < len(page.encode()) <= PAGE_BYTES
