"""A sweep that comes upon an ingest in the making: neither gets into the other's way."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from pathlib import Path

from wherry_content.backends.local import LocalBackend
from wherry_content.backends.local_ingest import LocalIngest
from wherry_shared.errors import Unavailable


async def fresh(maker: LocalBackend) -> LocalIngest:
    """As the store gets one for a blob that comes whole."""
    while True:
        with suppress(Unavailable):
            return await maker.open(secrets.token_hex(32), "a blob")


async def test_what_is_locked_stays_and_what_goes_meanwhile_is_passed_over(tmp_path: Path) -> None:
    maker, sweeper = LocalBackend(tmp_path), LocalBackend(tmp_path)
    await maker.start()
    await sweeper.start()
    over = False

    async def sweep() -> int:
        count = 0
        while not over:
            count += await sweeper.sweep(lambda key: False)
            await asyncio.sleep(0)
        return count

    sweeping = asyncio.create_task(sweep())
    try:
        for _ in range(20):
            held = await asyncio.gather(*(fresh(maker) for _ in range(16)))
            for each in held:
                each.check()  # locked, it is nobody's to take away
                await each.release(keep=False)
    finally:
        over = True
        await sweeping
        await maker.close()
        await sweeper.close()
