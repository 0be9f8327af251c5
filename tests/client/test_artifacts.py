"""What is no file system, and what has no bytes: kept, handed on, and never unpacked."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from wherry.client import Client

from .image_house import MANIFEST, Layout, dump, everything, house, tar_of

NAME = "docker.io/library/small:1"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with house(tmp_path) as made:
        yield made


async def test_blobs_without_bytes_come_too(client: Client, tmp_path: Path) -> None:
    layout = Layout()
    manifest = layout.image([tar_of({"a": b"1"}), b""])
    layout.name(manifest, full=NAME)
    (image,) = await client.import_images(io.BytesIO(layout.tar()))
    assert await everything(client) == set(layout.blobs)
    await client.export_images([image], tmp_path / "out.tar")
    async with house(tmp_path / "other") as other:
        (back,) = await other.import_images(tmp_path / "out.tar")
        assert back.target == image.target and await everything(other) == set(layout.blobs)


async def test_an_artifact_is_kept_and_not_unpacked(client: Client) -> None:
    layout = Layout()
    config, text = layout.blob("application/vnd.example.config", b"not JSON"), layout.blob("text/plain", b"hello")
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [text]}
    layout.name(layout.blob(MANIFEST, dump(document)), full=NAME)
    await client.import_images(io.BytesIO(layout.tar()), unpack=True, snapshotter="overlay")
    assert await everything(client) == set(layout.blobs)
