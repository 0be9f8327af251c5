"""Which layers of an image are unpacked already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from wherry.unpack import Unpack, chain_ids
from wherry_shared.errors import InvalidArgument, NotFound


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


async def test_a_layer_that_cannot_be_extracted_is_the_error_itself() -> None:
    async def apply(*args: Any, **options: Any) -> None:
        raise InvalidArgument("no layer")

    async def stat(*args: Any) -> None:
        raise NotFound("none")

    removed = list[str]()

    async def prepare(snapshotter: str, key: str, *args: Any, **options: Any) -> list[Any]:
        return []

    async def remove(snapshotter: str, key: str) -> None:
        removed.append(key)

    snapshots = SimpleNamespace(stat=stat, prepare=prepare, remove=remove)
    client: Any = SimpleNamespace(snapshots=snapshots, diff=SimpleNamespace(apply=apply))
    layers = [SimpleNamespace(digest=f"sha256:{number:064}", size=1) for number in range(3)]
    config = SimpleNamespace(diff_ids=[layer.digest for layer in layers])
    image: Any = SimpleNamespace(config=config, manifest=SimpleNamespace(layers=layers))
    with pytest.raises(InvalidArgument, match="no layer"):
        await Unpack(client, image, "overlay").run()
    assert len(removed) == 3
