"""Images into archives: what is in them, that they repeat, that they come back; and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from wherry.client import Client
from wherry_shared.errors import DataLoss, InvalidArgument, NotFound, ResourceExhausted
from wherry_shared.values import Platform

from .image_house import INDEX, MANIFEST, Layout, digest_of, dump, house, small, tar_of

NAME = "docker.io/library/small:1"
ARM = Platform(os="linux", architecture="arm64")


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with house(tmp_path) as made:
        yield made


@pytest.fixture
async def layout(client: Client) -> Layout:
    """One image in content, as `small`."""
    made, manifest = small()
    made.name(manifest, full=NAME)
    await client.import_images(io.BytesIO(made.tar()))
    return made


@pytest.fixture
async def both(client: Client) -> tuple[Layout, dict[str, Any], dict[str, Any]]:
    """An index of two platforms, as `both`."""
    made = Layout()
    amd, arm = (made.image([tar_of({"etc/arch": a.encode()})], a) for a in ("amd64", "arm64"))
    made.name(made.index({"amd64": amd, "arm64": arm}), full="docker.io/library/both:1")
    await client.import_images(io.BytesIO(made.tar()))
    return made, amd, arm


def read(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
        found = {m.name: archive.extractfile(m) for m in members if m.isfile()}
        return {name: file.read() for name, file in found.items() if file is not None}


async def export(client: Client, *names: str, **options: Any) -> bytes:
    out = io.BytesIO()
    await client.export_images(names, out, **options)
    return out.getvalue()


async def test_an_archive_is_a_layout_and_dockers(client: Client, layout: Layout) -> None:
    await (await client.image("small:1")).tag("quay.example/x:2")
    files = read(await export(client, "small:1", "quay.example/x:2"))
    assert {f"sha256:{name.rpartition('/')[2]}" for name in files if name.startswith("blobs/")} == set(layout.blobs)
    assert all(files[f"blobs/{digest.replace(':', '/')}"] == data for digest, data in layout.blobs.items())
    index = json.loads(files["index.json"])
    assert index["mediaType"] == INDEX and json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    assert [entry["annotations"] for entry in index["manifests"]] == [
        {"io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": "1"},
        {"io.containerd.image.name": "quay.example/x:2", "org.opencontainers.image.ref.name": "2"},
    ]
    (saved,) = json.loads(files["manifest.json"])
    assert saved["RepoTags"] == ["small:1", "quay.example/x:2"]
    assert saved["Config"] in files and all(layer in files for layer in saved["Layers"])
    assert "manifest.json" not in read(await export(client, "small:1", docker=False))


async def test_a_pipe_that_nobody_reads_yet_holds_up_nobody(client: Client, layout: Layout, tmp_path: Path) -> None:
    """The loop stood still in open(2), and no interrupt was heard."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    waiting = asyncio.create_task(client.export_images(["small:1"], pipe))
    for _ in range(3):
        await client.image("small:1")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    whole = asyncio.create_task(client.export_images(["small:1"], pipe))
    assert await asyncio.to_thread(pipe.read_bytes) == await export(client, "small:1")
    await whole
    assert pipe.is_fifo()


async def test_it_repeats_and_comes_back(client: Client, layout: Layout, tmp_path: Path) -> None:
    first = await export(client, "small:1")
    assert await export(client, "small:1") == first
    await client.export_images(["small:1"], tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == first
    async with house(tmp_path / "other") as other:
        (image,) = await other.import_images(tmp_path / "a.tar")
        assert (image.name, image.target.digest) == (NAME, layout.entries[0]["digest"])
        assert await export(other, "small:1") == first
        # docker's half alone gives the same image, but for its manifest, which is made anew
        files = {name: data for name, data in read(first).items() if name not in ("index.json", "oci-layout")}
        (loaded,) = await other.import_images(io.BytesIO(tar_of(files)))
        assert (await loaded.resolve()).config == (await image.resolve()).config


async def test_one_platform_of_two(client: Client, both: tuple[Layout, dict[str, Any], dict[str, Any]]) -> None:
    made, amd, arm = both
    index = made.entries[0]["digest"]
    files = read(await export(client, "both:1", platforms=[ARM]))
    blobs = {f"sha256:{name.rpartition('/')[2]}" for name in files if name.startswith("blobs/")}
    assert arm["digest"] in blobs and amd["digest"] not in blobs and index in blobs
    (saved,) = json.loads(files["manifest.json"])
    assert saved["RepoTags"] == ["both:1"]
    for name in [d for d in made.blobs if d not in blobs]:
        await client.content.delete(name)
    assert read(await export(client, "both:1", platforms=[ARM])) == files
    with pytest.raises(NotFound, match=f"manifest {amd['digest']}"):
        await export(client, "both:1", all_platforms=True)


async def test_all_platforms(client: Client, both: tuple[Layout, dict[str, Any], dict[str, Any]]) -> None:
    made, _, _ = both
    files = read(await export(client, "both:1", all_platforms=True))
    assert len([name for name in files if name.startswith("blobs/")]) == len(made.blobs)
    # A tag can mean one of docker's images only: this host's, where there is one.
    assert sorted(saved["RepoTags"] for saved in json.loads(files["manifest.json"])) == [[], ["both:1"]]


async def test_what_cannot_be_exported(client: Client, layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="name one"):
        await export(client)
    with pytest.raises(NotFound, match="nobody"):
        await export(client, "small:1", "nobody:1")
    with pytest.raises(InvalidArgument, match="both"):
        await export(client, "small:1", platforms=[ARM], all_platforms=True)
    with pytest.raises(NotFound, match="nowhere"):
        await client.export_images(["small:1"], tmp_path / "nowhere" / "a.tar")
    layer = next(digest for digest, data in layout.blobs.items() if b"etc/more" in data)
    await client.content.delete(layer)
    out = io.BytesIO()
    with pytest.raises(NotFound, match=f"small:1 is incomplete: layer {layer}"):
        await client.export_images(["small:1"], out)
    assert out.getvalue() == b""


async def test_more_names_than_can_be_read_again(client: Client, layout: Layout, tmp_path: Path) -> None:
    image = await client.image("small:1")
    with pytest.raises(ResourceExhausted, match="1001"):
        await client.export_images([image] * 1001, tmp_path / "out.tar")
    assert not (tmp_path / "out.tar").exists()


async def test_a_rotten_blob_is_not_exported(client: Client, layout: Layout, tmp_path: Path) -> None:
    layer = next(digest for digest, data in layout.blobs.items() if b"etc/more" in data)
    path = Path((await client.content.locate(layer)).path)
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    target = tmp_path / "a.tar"
    target.write_bytes(b"old")
    with pytest.raises(DataLoss, match="rotten"):
        await client.export_images(["small:1"], target)
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.glob(".tmp*")] == []


async def test_a_target_that_takes_a_little_at_a_time(client: Client, layout: Layout) -> None:
    class Slow:
        def __init__(self) -> None:
            self.got = bytearray()

        def write(self, data: memoryview) -> int:
            self.got += data[:1000]
            return min(1000, len(data))

    slow = Slow()
    await client.export_images(["small:1"], slow)
    assert bytes(slow.got) == await export(client, "small:1")


async def test_a_foreign_layer_is_left_out_unless_asked_for(client: Client) -> None:
    made, elsewhere = Layout(), tar_of({"licensed": b"1"})
    manifest = made.image([tar_of({"own": b"1"}), elsewhere])
    document = json.loads(made.blobs.pop(manifest["digest"]))
    document["layers"][1]["mediaType"] = "application/vnd.docker.image.rootfs.foreign.diff.tar"
    document["layers"][1]["urls"] = ["https://elsewhere.example/layer"]
    made.name(made.blob(MANIFEST, dump(document)), full=NAME)
    # It comes back without that layer, too: an archive that leaves it out is whole.
    await client.import_images(io.BytesIO(made.tar(digest_of(elsewhere))))
    await client.import_images(io.BytesIO(made.tar()))
    layer = f"blobs/{digest_of(elsewhere).replace(':', '/')}"
    without, whole = read(await export(client, "small:1")), read(await export(client, "small:1", foreign_layers=True))
    assert layer not in without and "manifest.json" not in without  # docker could not load that
    assert whole[layer] == elsewhere and layer in json.loads(whole["manifest.json"])[0]["Layers"]
