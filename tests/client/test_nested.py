"""Platforms that are asked for: of an index of indexes, and of an image that has one alone."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import images
import pytest
from wherry.client import Client, walk
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


async def test_an_image_of_one_platform_is_not_taken_for_another(client: Client) -> None:
    layout = Layout()
    store = Store()
    store.put(layout, layout.image([tar_of({"a": b"1"})], OTHERS[0]))
    other, own = [Platform(os="linux", architecture=name) for name in (HOST, OTHERS[0])]
    async with serving(store.handle) as trap:
        name = f"{trap.address}/team/app:v1"
        for wanted in (other, [own, other]):
            with pytest.raises(NotFound, match=OTHERS[0]):
                await client.pull(name, platform=wanted)
        assert await walk(client.images.walk) == []
        await client.pull(name, platform=other, all_platforms=True)
        await client.pull(name, platform=own)
        image = await client.pull(name)
        with pytest.raises(NotFound, match=OTHERS[0]):
            await client.push(name, f"{trap.address}/team/other:v1", platform=other)
        await client.push(name, f"{trap.address}/team/own:v1", platform=own)
        assert "team/other" not in store.manifests and "team/own" in store.manifests
    with pytest.raises(NotFound, match=OTHERS[0]):
        await client.export_images([name], io.BytesIO(), platforms=[other])
    await client.export_images([name], io.BytesIO())
    await client.export_images([name], io.BytesIO(), platforms=[own])
    with pytest.raises(NotFound, match=OTHERS[0]):
        await client.convert(image, "other:1", platforms=[other])
    await client.convert(image, "own:1", platforms=[own])
