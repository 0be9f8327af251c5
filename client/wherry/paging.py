"""Walks: pages of a service's records, one after another."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from wherry_shared.bus.proxy import walk as pages
from wherry_shared.values import Page

T = TypeVar("T")


async def walk(
    window: Callable[..., Awaitable[Page[T]]], filters: list[str] | None = None, **arguments: Any
) -> list[T]:
    """Every item of a walk: `await walk(client.images.walk, ['name~=redis'])`."""
    items: list[T] = []
    if filters:
        arguments["filters"] = filters
    async for page in pages(window, **arguments):
        items += page.items
    return items
