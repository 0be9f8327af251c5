"""How much of a store's threads a verification takes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from housebus import PATIENCE
from wherry_content.store import VERIFIED, VERIFIED_OF_ONE, Store


class Slow:
    """A backend whose blobs are read again until the gate opens."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.gate = asyncio.Event()

    async def compute(self, digest: str, *, fresh: bool = False) -> tuple[str, object]:
        self.began.append(digest)
        await self.gate.wait()
        return digest, None


async def test_one_namespace_verifies_a_few_at_a_time() -> None:
    """Sixteen of a large blob had every thread of the store, and nobody on the node could read or write."""
    backend, metadata = Slow(), SimpleNamespace(get=lambda namespace, digest: None)
    made: Any = Store
    store: Store = made(metadata, backend, instance="i")
    async with asyncio.timeout(PATIENCE):
        calls = [asyncio.create_task(store.verify("a", "mine")) for _ in range(50)]
        calls.append(asyncio.create_task(store.verify("b", "other")))
        while "other" not in backend.began:
            await asyncio.sleep(0)
        assert backend.began == ["mine"] * VERIFIED_OF_ONE + ["other"]
        calls += [asyncio.create_task(store.verify(f"n{n}", "more")) for n in range(50)]
        while len(backend.began) < VERIFIED:
            await asyncio.sleep(0)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert len(backend.began) == VERIFIED
        backend.gate.set()
        await asyncio.gather(*calls)
    assert len(backend.began) == 101
