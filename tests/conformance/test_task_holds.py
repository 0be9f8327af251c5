"""Containers that stand still for somebody: they go on when nobody says any more that they are to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from housebus import PATIENCE
from task_house import House, house_of
from wherry import commit
from wherry_shared.bus import Bus
from wherry_shared.bus.events import Subscriber
from wherry_shared.errors import FailedPrecondition, InvalidArgument
from wherry_task import freezing


@pytest.fixture(params=["crun", "runc"])
async def house(request: pytest.FixtureRequest, bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    async with house_of(bus, tmp_path, request.param) as made:
        yield made


@pytest.fixture
async def id(house: House) -> str:
    return await house.running("/bin/sleep", "1000")


async def goes_on(house: House, id: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while (await house.tasks.get(id)).status != "running":
            await asyncio.sleep(0.01)


async def told(events: Subscriber) -> list[str]:
    """What is told of standing still, up to when it goes on."""
    found: list[str] = []
    async with asyncio.timeout(PATIENCE):
        while found[-1:] != ["/tasks/resumed"]:
            topic = (await anext(events)).topic
            found += [topic] if topic in ("/tasks/paused", "/tasks/resumed") else []
    return found


async def test_a_hold_that_nobody_asks_for_again_ends(house: House, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezing, "HOLD_SECONDS", 0.0)
    async with await house.bus.subscribe(namespace="default") as events:
        await house.tasks.pause(id, "mine")
        assert await told(events) == ["/tasks/paused", "/tasks/resumed"]
    await goes_on(house, id)
    with pytest.raises(FailedPrecondition, match="not held any more"):  # it is known to whoever held it
        await house.tasks.pause(id, "mine")


async def test_a_hold_that_is_asked_for_again_goes_on(house: House, id: str) -> None:
    async with await house.bus.subscribe(namespace="default") as events:
        await house.tasks.pause(id, "mine")
        await house.tasks.pause(id, "mine")
        for refused in (house.tasks.pause(id, "yours"), house.tasks.pause(id), house.tasks.resume(id, "yours")):
            with pytest.raises(FailedPrecondition):
                await refused
        await house.tasks.resume(id, "mine")
        assert await told(events) == ["/tasks/paused", "/tasks/resumed"]
    with pytest.raises(InvalidArgument):
        await house.tasks.pause(id, "x" * 77)


async def test_a_hold_ends_with_what_somebody_else_wants(house: House, id: str) -> None:
    await house.tasks.pause(id, "mine")
    await house.tasks.resume(id)
    await house.tasks.pause(id)
    with pytest.raises(FailedPrecondition, match="not held"):  # as when its time is over
        await house.tasks.resume(id, "mine")
    assert (await house.tasks.get(id)).status == "paused"
    await house.tasks.resume(id)


async def test_a_hold_outlives_its_service_and_ends_after_it(
    house: House, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.tasks.pause(id, "mine")
    await house.stop_tasks()
    await house.start_tasks()
    assert (await house.tasks.get(id)).status == "paused"
    await house.tasks.pause(id, "mine")
    await house.stop_tasks()
    monkeypatch.setattr(freezing, "HOLD_SECONDS", 0.0)
    await house.start_tasks()
    await goes_on(house, id)


async def test_a_hold_whose_pause_was_cut_off(house: House, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder and the service are killed between the deed and its record: nobody comes back."""
    await house.pause_unanswered(id, "mine")
    await house.stop_tasks()
    monkeypatch.setattr(freezing, "HOLD_SECONDS", 0.0)
    await house.start_tasks()
    await goes_on(house, id)
    assert not (await house.supervisor.task("default", id).shim.state()).paused


async def test_a_commit_says_that_its_container_went_on(house: House, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "HOLD_SECONDS", 0.1)
    for broken in (False, True):
        hold = commit.Hold(house.tasks, id)
        await hold.begin()
        assert (await house.tasks.get(id)).status == "paused"
        if broken:
            await house.tasks.resume(id)
        await hold.end()
        assert hold.broken == broken
        assert (await house.tasks.get(id)).status == "running"
    hold = commit.Hold(house.tasks, id)
    await hold.begin()
    await house.tasks.resume(id)
    async with asyncio.timeout(PATIENCE):
        while not hold.broken:
            await asyncio.sleep(0.01)
    await hold.end()
