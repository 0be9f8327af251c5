"""The table of records: pages that let others run, bounds, and what a mask changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from wherry_shared import catalog
from wherry_shared.catalog import RECORD_BYTES, SCHEMA, Table, check_mask, update_map
from wherry_shared.contract import Encoded, unpack
from wherry_shared.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from wherry_shared.filters import fields
from wherry_shared.sqlite import Database, Transaction
from wherry_shared.values import Model, Page


class Thing(Model):
    name: str
    labels: dict[str, str] = Field(default_factory=dict)


@pytest.fixture
async def things(tmp_path: Path) -> AsyncIterator[Table[Thing]]:
    database = await Database.open(tmp_path / "things.db", (SCHEMA,))
    yield Table(
        database,
        Thing,
        noun="thing",
        key=lambda thing: thing.name,
        adaptor=lambda thing: fields({"name": thing.name}, labels=thing.labels),
    )
    await database.close()


async def put(things: Table[Thing], *new: Thing, namespace: str = "ns") -> None:
    def write(tx: Transaction) -> None:
        for thing in new:
            things.insert(tx, namespace, thing)

    await things.database.write(write)


async def page_of(
    things: Table[Thing], filters: list[str], after: str, limit: int, keep: Callable[[Thing], bool] | None = None
) -> Page[Thing]:
    """A page as its caller decodes it."""
    answer: object = await things.page("ns", filters, after, limit, keep=keep)
    assert isinstance(answer, Encoded)
    return Page[Thing].model_validate(unpack(answer))


async def test_ten_thousand_come_in_pages_and_others_run_meanwhile(
    things: Table[Thing], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"t{n:05}" for n in range(10_000)]
    await put(things, *(Thing(name=name, labels={"n": name}) for name in names))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(other())
    seen: list[str] = []
    after, pages = "", 0
    while not pages or after:
        page = await page_of(things, [], after, 1000)
        seen += [t.name for t in page.items]
        after, pages = page.next, pages + 1
    assert (seen, pages) == (names, 10)
    monkeypatch.setattr(catalog, "_TURN", -1)  # each record a turn: how many there are is no matter of the machine
    turns = 0
    assert (await page_of(things, ["labels.none==x"], "", 1000)).items == []
    assert turns > 1000
    task.cancel()


async def test_the_last_page_says_so_and_odd_bounds_are_clamped(things: Table[Thing]) -> None:
    await put(things, *(Thing(name=n) for n in "abc"))
    await put(things, Thing(name="d"), namespace="ns2")
    for limit, count, following in ((3, 3, ""), (2, 2, "b"), (-5, 1, "a"), (10**9, 3, "")):
        page = await page_of(things, [], "", limit)
        assert (len(page.items), page.next) == (count, following)
    assert (await page_of(things, [], "c", 5)).items == []
    kept = await page_of(things, [], "", 5, keep=lambda thing: thing.name != "b")
    assert [t.name for t in kept.items] == ["a", "c"]


async def test_keys_are_text_of_any_kind_in_order_of_code_points(things: Table[Thing]) -> None:
    names = ["", "%", "A", "a", "a b", "a'b", "a\x00b", "é", "\uffff", "😀"]
    await put(things, *(Thing(name=name) for name in reversed(names)))
    page = await page_of(things, [], "", 100)
    assert [t.name for t in page.items] == sorted(names)[1:]  # "" is before the first page
    assert unpack(cast(bytes, things.answer("ns", "a\x00b"))) == {"name": "a\x00b"}
    assert things.get("ns", "a\x00b").name == "a\x00b"


async def test_errors_name_the_thing(things: Table[Thing]) -> None:
    await put(things, Thing(name="a"))
    with pytest.raises(AlreadyExists, match="thing 'a': already exists"):
        await put(things, Thing(name="b"), Thing(name="a"))
    with pytest.raises(NotFound, match="thing 'b': not found"):
        things.get("ns", "b")
    for change in (
        lambda tx: things.replace(tx, "ns", Thing(name="b")),
        lambda tx: things.remove(tx, "ns", "b"),
        lambda tx: things.require(tx, "ns", "b"),
    ):
        with pytest.raises(NotFound, match="thing 'b'"):
            await things.database.write(change)


async def test_a_record_that_fits_into_no_answer_is_refused(things: Table[Thing]) -> None:
    await put(things, Thing(name="large", labels={"x": "y" * (RECORD_BYTES - 100)}))
    with pytest.raises(ResourceExhausted, match="'larger' takes"):
        await put(things, Thing(name="larger", labels={"x": "y" * RECORD_BYTES}))
    assert things.keys("ns") == ["large"]


@pytest.mark.parametrize("path", ["", "x", "labels.", ".labels", "label", "specs", "spec.x", "labels"])
def test_an_unknown_path_is_named(path: str) -> None:
    with pytest.raises(InvalidArgument, match=f"path '{path}'"):
        check_mask(["spec", "labels.a.b", path], ("spec",), ("labels",))


MAPS = st.dictionaries(st.sampled_from(["a", "b", "a.b", "x/y"]), st.integers())


@given(MAPS, MAPS, st.lists(st.sampled_from(["a", "b", "a.b", "x/y", "none"])))
def test_a_mask_takes_over_what_it_names_and_nothing_else(
    old: dict[str, int], new: dict[str, int], keys: list[str]
) -> None:
    changed = update_map(old, new, [f"m.{key}" for key in keys], "m")
    assert changed == {k: v for k, v in old.items() if k not in keys} | {k: v for k, v in new.items() if k in keys}
    assert update_map(old, new, ["m"], "m") == new
    assert update_map(old, new, ["mm", "other.a"], "m") == old
