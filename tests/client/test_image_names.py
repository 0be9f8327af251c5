"""Names that images are recorded under: a digest among them is a promise, and others take and give names meanwhile."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from wherry.client import Client, walk
from wherry_shared.errors import InvalidArgument

from .image_house import house, small

NAME = "docker.io/library/small:1"
OTHER = "sha256:" + "0" * 64


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with house(tmp_path / "house") as made:
        yield made


async def test_an_archive_names_no_image_by_anothers_digest(client: Client) -> None:
    layout, manifest = small()
    layout.name(manifest, full=f"docker.io/library/redis@{OTHER}")
    with pytest.raises(InvalidArgument, match=OTHER):
        await client.import_images(io.BytesIO(layout.tar()))
    assert await walk(client.images.walk) == []
    layout.entries.clear()
    layout.name(manifest, full=f"docker.io/library/redis:7@{manifest['digest']}")
    (image,) = await client.import_images(io.BytesIO(layout.tar()))
    assert image.name == f"docker.io/library/redis:7@{manifest['digest']}"


async def test_nothing_is_called_by_anothers_digest(client: Client) -> None:
    layout, manifest = small()
    layout.name(manifest, full=NAME)
    (image,) = await client.import_images(io.BytesIO(layout.tar()))
    with pytest.raises(InvalidArgument, match=OTHER):
        await image.tag(f"redis@{OTHER}", force=True)
    with pytest.raises(InvalidArgument, match="still to be made"):
        await client.convert(image, f"redis@{manifest['digest']}", compression="gzip")
    assert (await image.tag(f"redis@{manifest['digest']}")).target == image.target


async def test_a_name_that_is_removed_while_it_is_given_is_given(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, manifest = small()
    layout.name(manifest, full=NAME)
    (image,) = await client.import_images(io.BytesIO(layout.tar()))
    update = client.images.update

    async def late(*arguments: Any) -> Any:
        monkeypatch.setattr(client.images, "update", update)
        await client.images.delete(NAME)
        return await update(*arguments)

    for again in (
        lambda: client.import_images(io.BytesIO(layout.tar())), lambda: image.tag(NAME, force=True),
        lambda: client.convert(image, NAME, compression="gzip"),
    ):  # fmt: skip
        monkeypatch.setattr(client.images, "update", late)
        await again()
        assert client.images.update is not late, "the name was there, and was removed just then"
        assert (await client.image(NAME)).name == NAME
