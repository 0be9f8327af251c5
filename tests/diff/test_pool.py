"""Whose work the processes do."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from housebus import PATIENCE
from wherry_diff.pool import Pool
from wherry_shared import context
from wherry_shared.context import Context, Identity


def hold(place: str) -> int:
    """Work that says that it began, and takes until it is let go."""
    Path(f"{place}/{os.getpid()}").touch()
    while not os.path.exists(f"{place}/go"):
        time.sleep(0.01)
    return os.getpid()


async def run_as(pool: Pool, name: str, place: Path | None) -> int:
    context.enter(Context(namespace=name, identity=Identity(f"tenant-{name}", "tenant", name)))
    return await (pool._run(os.getpid) if place is None else pool._run(hold, str(place)))


async def test_one_tenants_layers_hold_up_nobody_elses(tmp_path: Path) -> None:
    """Two that take minutes had every worker of a node with two cores: nobody pulled anything meanwhile."""
    place, pool = tmp_path / "place", Pool(2, tmp_path)
    place.mkdir()
    try:
        async with asyncio.timeout(PATIENCE):
            own = [asyncio.create_task(run_as(pool, "a", place)) for _ in range(3)]
            while not list(place.iterdir()):
                await asyncio.sleep(0.01)
            await asyncio.create_task(run_as(pool, "b", None))
            await pool._run(os.getpid)
            assert len(list(place.iterdir())) == 1 and not any(task.done() for task in own)
            (place / "go").touch()
            await asyncio.gather(*own)
    finally:
        (place / "go").touch()
        pool.close()
