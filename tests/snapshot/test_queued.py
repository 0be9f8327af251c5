"""Commits of a chain are queued one behind the other: together, in their order, and none on what came to nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
from snapshot_rig import House, needs_root
from wherry_shared.api.snapshot import REBASE_LABEL, Info, Snapshots
from wherry_shared.errors import Aborted, NotFound
from wherry_shared.sqlite import Database, Transaction
from wherry_snapshot.metadata import Row, Rows

pytestmark = needs_root

NAMES = [f"layer-{i}" for i in range(20)]


@pytest.fixture
def api(house: House) -> Snapshots:
    return house.bus.proxy(Snapshots, namespace="default")


async def prepared(api: Snapshots, snapshotter: str, names: Sequence[str]) -> None:
    for name in names:
        await api.prepare(snapshotter, f"{name}-key", labels={REBASE_LABEL: "1"})


def commits(api: Snapshots, snapshotter: str, names: Sequence[str], patience: float = 30.0) -> list[asyncio.Task[Info]]:
    """All of them asked for, the topmost first."""
    pairs = list(zip(names, ["", *names], strict=False))
    asked = [
        asyncio.create_task(api.commit(snapshotter, name, f"{name}-key", parent, patience=patience))
        for name, parent in reversed(pairs)
    ]
    return asked[::-1]


@pytest.mark.parametrize("snapshotter", ["overlay", "erofs"])
async def test_a_chain_takes_few_transactions(
    house: House, api: Snapshots, snapshotter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if snapshotter not in await api.snapshotters():
        pytest.skip(f"no {snapshotter} here")
    await prepared(api, snapshotter, NAMES)
    groups: list[int] = []
    transact = Database._transact_now

    def counted(self: Database, group: Any) -> int:
        if self.path.parent.name == "snapshot":
            if not groups:
                time.sleep(0.5)  # the others come meanwhile, also on a machine that has other work
            groups.append(len(group))
        return transact(self, group)

    monkeypatch.setattr(Database, "_transact_now", counted)
    found = await asyncio.gather(*commits(api, snapshotter, NAMES))
    assert [info.parent for info in found] == ["", *NAMES[:-1]]
    assert snapshotter != "overlay" or len(groups) < len(NAMES)  # each waited for the one before it once
    mounts = await api.view(snapshotter, "look", NAMES[-1])
    assert len(str(mounts).split("snapshots/")) > len(NAMES)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, times: int = 1) -> None:
    """Let the transaction of a commit fail where the others after it are queued already."""
    replace, left = Rows.replace, [times]

    def fail(self: Rows, tx: Transaction, row: Row) -> None:
        if row.name == name and row.kind == "committed" and left[0]:
            left[0] -= 1
            raise Aborted("not now")
        replace(self, tx, row)

    monkeypatch.setattr(Rows, "replace", fail)


async def test_those_above_a_commit_that_fails_wait_for_the_next(
    house: House, api: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prepared(api, "overlay", NAMES)
    failing(monkeypatch, NAMES[3])
    asked = commits(api, "overlay", NAMES)
    with pytest.raises(Aborted):
        await asked[3]
    await asyncio.gather(*asked[:3])
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in asked[4:])
    await api.commit("overlay", NAMES[3], f"{NAMES[3]}-key", NAMES[2])
    assert [info.parent for info in await asyncio.gather(*asked[4:])] == NAMES[3:-1]


async def test_they_do_not_wait_for_ever(house: House, api: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    await prepared(api, "overlay", NAMES[:3])
    failing(monkeypatch, NAMES[0])
    first, *others = commits(api, "overlay", NAMES[:3], patience=0.3)
    with pytest.raises(Aborted):
        await first
    for name, task in zip(NAMES, others, strict=False):
        with pytest.raises(NotFound, match=name):
            await task
    for name in NAMES[:3]:  # all are as they were
        assert (await api.stat("overlay", f"{name}-key")).kind == "active"
    await asyncio.gather(*commits(api, "overlay", NAMES[:3]))


async def test_one_name_twice(house: House, api: Snapshots) -> None:
    """Two want the name that a third is to stand on: it stands on the one that got it."""
    for key in ("a", "b", "c"):
        await api.prepare("overlay", key, labels={REBASE_LABEL: "1"})
    twice = [asyncio.create_task(api.commit("overlay", "base", key)) for key in ("a", "b")]
    child = asyncio.create_task(api.commit("overlay", "top", "c", "base", patience=30.0))
    outcomes = await asyncio.gather(*twice, return_exceptions=True)
    assert sorted(type(o).__name__ for o in outcomes) == ["AlreadyExists", "Info"]
    assert (await child).parent == "base"
    loser = "b" if isinstance(outcomes[0], Info) else "a"
    assert (await api.stat("overlay", loser)).kind == "active"
