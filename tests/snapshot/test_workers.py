"""Whose work the threads of a snapshotter do."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from housebus import PATIENCE
from wherry_shared import context
from wherry_shared.context import Context, Identity
from wherry_snapshot.workers import ONE_TENANTS, Workers


async def run_as(workers: Workers, name: str, gate: threading.Event | None, began: list[str]) -> None:
    """Work for a tenant that takes until `gate` is set."""

    def work() -> None:
        began.append(name)
        if gate is not None:
            gate.wait()

    context.enter(Context(namespace=name, identity=Identity(f"tenant-{name}", "tenant", name)))
    await workers.run(work)


async def test_one_tenants_work_holds_up_nobody_else(tmp_path: Path) -> None:
    """Four measurements of a tree of a million files had everybody's snapshots wait."""
    workers, gate, began = Workers("toy", tmp_path), threading.Event(), list[str]()
    try:
        async with asyncio.timeout(PATIENCE):
            own = [asyncio.create_task(run_as(workers, "a", gate, began)) for _ in range(10)]
            while len(began) < ONE_TENANTS:
                await asyncio.sleep(0.001)
            await asyncio.create_task(run_as(workers, "b", None, began))
            await workers.run(began.append, "admin")
            assert began == ["a"] * ONE_TENANTS + ["b", "admin"]
            gate.set()
            await asyncio.gather(*own)
        assert began.count("a") == 10
    finally:
        gate.set()
        await workers.close()
