"""A sweep that comes upon an ingest in the making: neither gets into the other's way."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

from wherry_content.backends.local import LocalBackend


async def test_what_is_just_being_made_is_no_other_writers(tmp_path: Path) -> None:
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
            held = await asyncio.gather(*(maker.open(secrets.token_hex(32), "a blob") for _ in range(16)))
            for each in held:
                each.check()  # locked, it is nobody's to take away
                await each.release(keep=False)
    finally:
        over = True
        await sweeping
        await maker.close()
        await sweeper.close()
