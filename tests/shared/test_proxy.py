"""What a caller is told at its deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from wherry_shared import context
from wherry_shared.api.image import Images
from wherry_shared.bus import Bus
from wherry_shared.bus.transport import Message, NoResponders
from wherry_shared.errors import DeadlineExceeded, Unavailable
from wherry_shared.memory import MemoryTransport

ANSWER = 0.01


class Nobody(MemoryTransport):
    """Nobody listens, which is told within ANSWER seconds."""

    async def request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, timeout: float
    ) -> Message:
        raise NoResponders(subject) if timeout >= ANSWER else DeadlineExceeded(subject)


async def test_a_service_that_is_away_was_never_asked() -> None:
    """Also where its deadline comes in the very moment in which it is looked for again."""
    images = Bus(Nobody(), node="n1").proxy(Images, namespace="default")
    with context.use(timeout=0.3):
        said = await asyncio.gather(*(images.delete("x") for _ in range(200)), return_exceptions=True)
    assert {type(each) for each in said} == {Unavailable}
