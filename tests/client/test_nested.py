"""An index of indexes, one a platform: in each only that platform's image is looked for, whatever is done with it."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import images
import pytest
from wherry.client import Client
from wherry_shared.errors import NotFound
from wherry_shared.values import Platform

from .image_house import INDEX, Layout, dump, everything, house, tar_of
from .registry_store import Store
from .registry_traps import serving

HOST = images.architecture()
OTHERS = [name for name in ("amd64", "arm64", "s390x") if name != HOST]
WANTED = [Platform(os="linux", architecture=name) for name in (HOST, OTHERS[0])]


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with house(tmp_path / "house") as made:
        yield made


def nested() -> tuple[Layout, dict[str, Any], dict[str, dict[str, Any]]]:
    layout = Layout()
    children = {name: layout.image([tar_of({name: b"1"})], name) for name in (HOST, *OTHERS)}
    listed = [
        {**layout.index({name: child}), "platform": {"os": "linux", "architecture": name}}
        for name, child in children.items()
    ]
    return layout, layout.blob(INDEX, dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed})), children


async def test_several_platforms_are_pulled_sent_on_and_written(client: Client) -> None:
    layout, index, children = nested()
    store = Store()
    store.put(layout, index)
    async with serving(store.handle) as trap:
        image = await client.pull(f"{trap.address}/team/app:v1", platform=WANTED)
        here = await everything(client)
        assert {children[name]["digest"] for name in (HOST, OTHERS[0])} <= here
        assert children[OTHERS[1]]["digest"] not in here
        for platform in WANTED:
            assert (await image.resolve(platform)).descriptor.digest == children[platform.architecture]["digest"]
        await client.push(image.name, f"{trap.address}/team/some:v1", platform=WANTED)
        kept = store.manifests["team/some"]
    assert {children[name]["digest"] for name in (HOST, OTHERS[0])} <= kept.keys()
    assert children[OTHERS[1]]["digest"] not in kept
    archive = io.BytesIO()
    await client.export_images([image.name], archive, platforms=WANTED)
    converted = await client.convert(image, "some:gzip", compression="gzip", platforms=WANTED)
    for platform in WANTED:
        assert (await converted.resolve(platform)).config.platform.architecture == platform.architecture


async def test_a_platform_that_is_named_above_and_missing_below(client: Client) -> None:
    layout = Layout()
    inner = layout.index({OTHERS[0]: layout.image([tar_of({"a": b"1"})], OTHERS[0])})
    index = layout.index({HOST: inner})
    store = Store()
    store.put(layout, index)
    async with serving(store.handle) as trap:
        with pytest.raises(NotFound, match=HOST):
            await client.pull(f"{trap.address}/team/app:v1", platform=WANTED[:1])


async def test_all_metadata_goes_into_the_indexes_of_other_platforms(client: Client) -> None:
    layout, index, _ = nested()
    store = Store()
    store.put(layout, index)
    async with serving(store.handle) as trap:
        await client.pull(f"{trap.address}/team/app:v1", all_metadata=True)
    documents = {digest for digest, data in layout.blobs.items() if data.startswith(b"{")}
    here = await everything(client)
    assert documents <= here and len(here) == len(documents) + 1, "and this host's one layer"
