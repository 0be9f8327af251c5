"""What is made, or taken away, to its end: whoever is cancelled meanwhile leaves nothing half done behind."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from wherry_shared import context
from wherry_shared.errors import DeadlineExceeded, Unavailable, WherryError

T = TypeVar("T")

UNDO_SECONDS = 10.0


async def made(make: Callable[[], Awaitable[T]], unmake: Callable[[T], Awaitable[object]]) -> T:
    """What one mutation makes; where it stays unknown whether it was made, it is gone when this raises."""
    key = context.current().call_key or secrets.token_hex(12)
    try:
        with context.use(key=key):
            return await make()
    except (asyncio.CancelledError, DeadlineExceeded, Unavailable):
        # Under the same key it is the same request, wherever that is by now: after it there is one to remove.
        with contextlib.suppress(WherryError), context.use(key=key, timeout=UNDO_SECONDS):
            await unmake(await make())
        raise


async def done(work: Coroutine[Any, Any, T]) -> T:
    """Work that goes on to its end where this is cancelled; that is told after it, or after UNDO_SECONDS."""
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working], timeout=UNDO_SECONDS)
        if working.done() and not working.cancelled():
            working.exception()  # the cancellation is what is told
        raise
