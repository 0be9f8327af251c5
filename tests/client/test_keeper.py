"""A container that is stopped or removed just while its restart policy has it started again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from wherry.node.keeper import Keeper
from wherry.restarts import STOPPED
from wherry_shared.errors import NotFound, Unavailable


class _Node:
    """A client, and the only container there; `then` is what it answers when it is asked after the start."""

    def __init__(self, *then: dict[str, str] | Exception) -> None:
        self.then = list(then)
        self.done: list[str] = []
        self.tasks = self

    def within(self, _: str) -> _Node:
        return self

    def one(self, labels: dict[str, str]) -> Any:
        async def start(again: int) -> None:
            self.done.append("started")

        async def stop() -> None:
            self.done.append("stopped")

        async def task() -> Any:
            return SimpleNamespace(stop=stop)

        return SimpleNamespace(record=SimpleNamespace(labels=labels), start=start, task=task)

    async def container(self, _: str) -> Any:
        answer = self.then.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return self.one(answer)

    async def delete(self, id: str, exec_id: str, force: bool) -> None:
        assert (id, exec_id, force) == ("c", "", True)
        self.done.append("deleted")


async def _started(*then: dict[str, str] | Exception) -> list[str]:
    node: Any = _Node(*then)
    await Keeper(node)._start(("default", "c"), node.one({}))
    return list(node.done)


async def test_it_is_stopped() -> None:
    assert await _started({STOPPED: "true"}) == ["started", "stopped"]
    assert await _started(Unavailable("away"), {STOPPED: "true"}) == ["started", "stopped"]


async def test_it_is_gone() -> None:
    """A task without a container is one that nobody sees."""
    assert await _started(NotFound("c")) == ["started", "deleted"]


async def test_it_runs() -> None:
    assert await _started({}) == ["started"]
