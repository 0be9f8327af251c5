"""Images in another shape: the same files, the same diff ids, the same digest for the same input."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from wherry.client import Client, walk
from wherry.image import read_document
from wherry_shared.errors import DataLoss, InvalidArgument, NotFound
from wherry_shared.streams import read_blob
from wherry_shared.values import Platform

from .image_house import INDEX, LAYER, MANIFEST, Layout, digest_of, dump, everything, house, small, tar_of

NAME = "docker.io/library/small:1"
DOCKER = "application/vnd.docker"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with house(tmp_path) as made:
        yield made


async def imported(client: Client, layout: Layout, target: dict[str, Any]) -> None:
    layout.name(target, full=NAME)
    await client.import_images(io.BytesIO(layout.tar()))


async def blob(client: Client, digest: str) -> bytes:
    return b"".join([chunk async for chunk in read_blob(client.content, digest, verify=True)])


UNPACK = {
    "gzip": lambda data: zlib.decompress(data, 31),
    "zstd": lambda data: zstandard.ZstdDecompressor().stream_reader(data).read(),
    "none": lambda data: data,
}


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
async def test_layers_in_another_compression(client: Client, kind: str) -> None:
    await imported(client, *small())
    before = await (await client.image("small:1")).resolve()
    image = await client.convert("small:1", "other:1", compression=kind)
    after = await image.resolve()
    assert image.name == "docker.io/library/other:1"
    assert after.config == before.config and after.manifest.config == before.manifest.config
    for layer, diff_id in zip(after.manifest.layers, after.config.diff_ids, strict=True):
        assert layer.media_type == f"{LAYER}+{kind}"
        assert digest_of(UNPACK[kind](await blob(client, layer.digest))) == diff_id
        info = await client.content.info(layer.digest)
        assert (info.labels, info.size) == ({"containerd.io/uncompressed": diff_id}, layer.size)
    labels = (await client.content.info(image.target.digest)).labels
    assert set(labels.values()) == {after.manifest.config.digest, *(layer.digest for layer in after.manifest.layers)}
    assert await walk(client.leases.walk) == [] and await client.content.statuses() == []


async def test_it_repeats(client: Client, tmp_path: Path) -> None:
    await imported(client, *small())
    first = await client.convert("small:1", "a:1", compression="zstd")
    content = await everything(client)
    second = await client.convert("small:1", "b:1", compression="zstd")
    third = await client.convert(second, "c:1", compression="zstd")
    assert first.target == second.target == third.target
    assert await everything(client) == content
    async with house(tmp_path / "other") as other:
        await imported(other, *small())
        assert (await other.convert("small:1", "a:1", compression="zstd")).target == first.target


async def test_several_at_once(client: Client) -> None:
    layout = Layout()
    layers = [tar_of({f"{name}": os.urandom(3 << 20)}) for name in range(3)]
    await imported(client, layout, layout.image(layers))
    made = await asyncio.gather(*(client.convert("small:1", f"n:{n}", compression="zstd") for n in range(5)))
    assert len({image.target.digest for image in made}) == 1
    assert await walk(client.leases.walk) == [] and await client.content.statuses() == []


async def test_there_and_back(client: Client) -> None:
    await imported(client, *small())
    packed = await client.convert("small:1", "a:1", compression="gzip")
    back = await client.convert(packed, "b:1", compression="none")
    assert back.target.digest == (await client.image("small:1")).target.digest


async def test_dockers_types_become_ocis(client: Client) -> None:
    plain = tar_of({"a": b"1"})
    config = dump(
        {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest_of(plain)]}}
    )
    entry = {"Config": "c.json", "RepoTags": ["small:1"], "Layers": ["l.tar"]}
    files = {"manifest.json": dump([entry]), "c.json": config, "l.tar": gzip.compress(plain)}
    (source,) = await client.import_images(io.BytesIO(tar_of(files)))
    assert source.target.media_type == f"{DOCKER}.distribution.manifest.v2+json"
    oci = await client.convert(source, "oci:1", oci=True)
    manifest = json.loads(await read_document(client, oci.target))
    assert oci.target.media_type == manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert manifest["layers"][0]["mediaType"] == f"{LAYER}+gzip"
    kept = await client.convert(source, "plain:1", compression="none")
    assert (await kept.resolve()).manifest.layers[0].media_type == f"{DOCKER}.image.rootfs.diff.tar"
    zstd = await client.convert(source, "zstd:1", compression="zstd")
    assert (await zstd.resolve()).manifest.layers[0].media_type == f"{LAYER}+zstd"


def attested() -> tuple[Layout, dict[str, Any], list[dict[str, Any]]]:
    """Two platforms, and what a build tool says of the first."""
    made = Layout()
    amd, arm = (made.image([tar_of({"etc/arch": a.encode()})], a) for a in ("amd64", "arm64"))
    statement = made.blob("application/vnd.in-toto+json", b"{}")
    config = made.blob("application/vnd.oci.image.config.v1+json", dump({"os": "unknown", "architecture": "unknown",
                       "rootfs": {"type": "layers", "diff_ids": [statement["digest"]]}}))  # fmt: skip
    about = made.blob("application/vnd.oci.image.manifest.v1+json", dump({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config,
        "layers": [statement]}))  # fmt: skip
    children = [
        {**about, "platform": {"os": "unknown", "architecture": "unknown"},
         "annotations": {"vnd.docker.reference.type": "attestation-manifest",
                         "vnd.docker.reference.digest": amd["digest"]}},
        {**amd, "platform": {"os": "linux", "architecture": "amd64"}, "annotations": {"kept": "yes"}},
        {**arm, "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}},
    ]  # fmt: skip
    index = made.blob(INDEX, dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": children}))
    return made, index, children


async def test_an_index_with_all_that_belongs_to_it(client: Client) -> None:
    layout, index, children = attested()
    await imported(client, layout, index)
    image = await client.convert("small:1", "other:1", compression="zstd")
    new = json.loads(await read_document(client, image.target))["manifests"]
    assert [child["platform"] for child in new] == [child["platform"] for child in children]
    assert new[0]["digest"] == children[0]["digest"]
    assert new[0]["annotations"]["vnd.docker.reference.digest"] == new[1]["digest"] != children[1]["digest"]
    assert new[1]["annotations"] == {"kept": "yes"}


async def test_some_platforms(client: Client) -> None:
    layout, index, children = attested()
    await imported(client, layout, index)
    arm = Platform(os="linux", architecture="arm64")
    image = await client.convert("small:1", "arm:1", platforms=[arm])
    (only,) = json.loads(await read_document(client, image.target))["manifests"]
    assert only == children[2]
    assert (await client.content.info(image.target.digest)).labels == {
        "containerd.io/gc.ref.content.m.0": only["digest"]
    }
    with pytest.raises(NotFound, match="s390x"):
        await client.convert("small:1", "s:1", platforms=[Platform(os="linux", architecture="s390x")])


async def test_a_layer_that_is_not_what_its_config_says(client: Client) -> None:
    layout = Layout()
    layer = layout.blob(f"{LAYER}+gzip", gzip.compress(tar_of({"a": b"1"})))
    config = layout.config([tar_of({"b": b"2"})])
    document = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config,
                "layers": [layer]}  # fmt: skip
    await imported(client, layout, layout.blob(document["mediaType"], dump(document)))
    before = await everything(client)
    with pytest.raises(DataLoss, match=layer["digest"]):
        await client.convert("small:1", "other:1", compression="zstd")
    assert await everything(client) == before
    assert await client.content.statuses() == [] and len(await walk(client.images.walk)) == 1


@pytest.mark.parametrize("bad", [{"compression": "lzma"}, {"compression": "gzip", "level": 10}, {"level": 1}])
async def test_wishes_that_are_none(client: Client, bad: dict[str, Any]) -> None:
    await imported(client, *small())
    with pytest.raises(InvalidArgument):
        await client.convert("small:1", "other:1", **bad)


async def test_lists_that_are_null(client: Client) -> None:
    layout = Layout()
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": layout.config([]), "layers": None}
    manifest = layout.blob(MANIFEST, dump(document))
    empty = layout.blob(INDEX, dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": None}))
    layout.name(manifest, full="docker.io/library/bare:1")
    layout.name(empty, full="docker.io/library/none:1")
    await client.import_images(io.BytesIO(layout.tar()))
    assert (await client.convert("bare:1", "b:1", compression="zstd")).target.digest == manifest["digest"]
    assert (await client.convert("none:1", "n:1", compression="zstd")).target.digest == empty["digest"]


async def test_many_layers_with_little_memory(client: Client) -> None:
    """A layer that grows a thousandfold passes in pieces."""
    import tracemalloc

    layout = Layout()
    plain = tar_of({"zeros": bytes(60 << 20)})
    layer = layout.blob(f"{LAYER}+gzip", gzip.compress(plain))
    document = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": layout.config([plain]), "layers": [layer]}  # fmt: skip
    diff_id = f"sha256:{hashlib.sha256(plain).hexdigest()}"
    del plain
    await imported(client, layout, layout.blob(document["mediaType"], dump(document)))
    tracemalloc.start()
    try:
        await client.convert("small:1", "other:1", compression="zstd")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    assert (
        await client.content.info((await (await client.image("other:1")).resolve()).manifest.layers[0].digest)
    ).labels == {"containerd.io/uncompressed": diff_id}
