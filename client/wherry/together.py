"""Several things at once, where the first that fails is the error of all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup that raises the first error itself, not a group of it: callers catch the errors of the house."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as e:
        raise _first(e) from None


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def each(work: Callable[[T], Coroutine[Any, Any, R]], items: Iterable[T], parallel: int = 16) -> list[R]:
    """`work` on every item, `parallel` at a time; the results in the items' order."""
    slots = asyncio.Semaphore(parallel)

    async def one(item: T) -> R:
        async with slots:
            return await work(item)

    async with together() as group:
        tasks = [group.create_task(one(item)) for item in items]
    return [task.result() for task in tasks]
