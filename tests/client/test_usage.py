"""What images take and lack, and what tags do."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from wherry.cli.content import verified
from wherry.client import Client
from wherry.image import Image
from wherry.usage import summaries
from wherry_shared.errors import AlreadyExists, InvalidArgument, NotFound

from .image_house import Layout, house, small, tar_of

NAME = "docker.io/library/small:1"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with house(tmp_path) as made:
        yield made


@pytest.fixture
async def image(client: Client) -> Image:
    layout, manifest = small()
    layout.name(manifest, full=NAME)
    (made,) = await client.import_images(io.BytesIO(layout.tar()))
    return made


async def test_what_an_image_takes(client: Client, image: Image) -> None:
    sizes = {digest: (await client.content.info(digest)).size for digest in await digests(client)}
    usage = await image.usage()
    manifest = (await image.resolve()).manifest
    assert usage.content == usage.unique == sum(sizes.values())
    assert usage.manifests == sizes[image.target.digest] + sizes[manifest.config.digest]
    assert usage.snapshots == {}
    await image.tag("other:1")
    assert (await image.usage()).unique == 0
    other = Layout()
    layers = [tar_of({"etc/name": b"hello"}), tar_of({"x": b"x" * 5000})]
    other.name(other.image(layers), full="docker.io/library/third:1")
    (third,) = await client.import_images(io.BytesIO(other.tar()))
    assert (await third.usage()).unique == (await third.usage()).content - len(layers[0])


async def digests(client: Client) -> set[str]:
    from .image_house import everything

    return await everything(client)


async def test_what_an_image_lacks(client: Client, image: Image) -> None:
    state = await image.state()
    assert state.complete and not state.missing and state.unpacked == []
    (platform,) = state.platforms
    assert platform.unpacked == {"overlay": False} and platform.config is not None
    layer = platform.layers[1]
    await client.content.delete(layer.digest)
    state = await image.state()
    assert not state.complete and [part.descriptor.digest for part in state.missing] == [layer.digest]
    assert [part.descriptor.digest for part in state.platforms[0].missing] == [layer.digest]
    await client.content.delete(image.target.digest)
    state = await image.state()
    assert not state.complete and state.platforms == ()


async def test_platforms_that_were_never_fetched_are_not_missing(client: Client) -> None:
    layout = Layout()
    amd, arm = (layout.image([tar_of({"etc/arch": a.encode()})], a) for a in ("amd64", "arm64"))
    layout.name(layout.index({"amd64": amd, "arm64": arm}), full=NAME)
    (image,) = await client.import_images(io.BytesIO(layout.tar()))
    await client.content.delete(arm["digest"])
    state = await image.state()
    assert state.complete and [child.digest for child in state.absent] == [arm["digest"]]
    (summary,) = await summaries(client, [image])
    assert [platform.architecture for platform in summary.platforms] == ["amd64"]


async def test_a_list_is_made_of_broken_images_too(client: Client, image: Image) -> None:
    gone = await image.tag("gone:1")
    await client.content.delete(image.target.digest)
    found = await summaries(client, [image, gone])
    assert [(summary.size, summary.platforms) for summary in found] == [(0, ())] * 2


async def test_tags(client: Client, image: Image) -> None:
    await client.images.update(image.record.model_copy(update={"labels": {"team": "web"}}), ["labels"])
    image = await client.image("small:1")
    other = await image.tag("quay.example/a:2")
    assert (other.name, other.target, other.record.labels) == ("quay.example/a:2", image.target, {"team": "web"})
    with pytest.raises(AlreadyExists):
        await image.tag("quay.example/a:2")
    layout, manifest = small(text="another")
    layout.name(manifest, full="docker.io/library/another:1")
    (another,) = await client.import_images(io.BytesIO(layout.tar()))
    moved = await another.tag("quay.example/a:2", force=True)
    assert (moved.target, moved.record.labels) == (another.target, {})
    with pytest.raises(InvalidArgument):
        await image.tag("UPPER")


async def test_names_that_only_their_record_knows(client: Client, image: Image) -> None:
    await client.images.create(image.record.model_copy(update={"name": "Not A Reference"}))
    assert (await client.image("Not A Reference")).target == image.target
    with pytest.raises(InvalidArgument):
        await client.image("Not There Either")
    with pytest.raises(NotFound):
        await client.image("nobody")


async def test_what_is_collected_meanwhile_is_not_verified(
    client: Client, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = await digests(client)
    verify, gone = client.content.verify, image.target.digest

    async def late(digest: str) -> None:
        if digest == gone:
            await client.content.delete(digest)
        await verify(digest)

    monkeypatch.setattr(client.content, "verify", late)
    assert await verified(client, []) == [{"digest": d, "state": "ok"} for d in sorted(there) if d != gone]
    with pytest.raises(NotFound):
        await verified(client, [gone])
