"""Which layers of an image are unpacked already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from wherry.unpack import Unpack, chain_ids
from wherry_shared.errors import NotFound


@pytest.mark.parametrize("layers", range(1, 10))
async def test_what_is_there_is_found_by_a_few_questions(layers: int) -> None:
    diff_ids = [f"sha256:{number:064}" for number in range(layers)]
    chain, asked = chain_ids(diff_ids), list[str]()
    image: Any = SimpleNamespace(config=SimpleNamespace(diff_ids=diff_ids), manifest=SimpleNamespace(layers=diff_ids))
    for there in range(layers + 1):
        asked.clear()

        async def stat(snapshotter: str, name: str, there: int = there) -> None:
            asked.append(name)
            if name not in chain[:there]:
                raise NotFound(name)

        client: Any = SimpleNamespace(snapshots=SimpleNamespace(stat=stat))
        assert await Unpack(client, image, "overlay")._first_missing() == there
        assert len(asked) <= 2 + layers.bit_length() and (there not in (0, layers) or len(asked) <= 2)
