"""Archives into content and images: what is read, what it is called, what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from wherry.archive.tar import Reader
from wherry.client import Client, walk
from wherry_shared.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
    WherryError,
)
from wherry_shared.values import Platform

from .image_house import LAYER, MANIFEST, Layout, digest_of, dump, everything, house, small, tar_of

NAME = "docker.io/library/small:1"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with house(tmp_path) as made:
        yield made


def named(architecture: str = "amd64") -> Layout:
    layout, manifest = small(architecture)
    layout.name(manifest, full=NAME, tag="1")
    return layout


async def nothing_is_left(client: Client) -> None:
    """No image, no ingest, no lease; what is in content nobody keeps."""
    assert await walk(client.images.walk) == []
    assert await client.content.statuses() == []
    assert await walk(client.leases.walk) == []


async def refuses(client: Client, data: bytes, error: type[WherryError], match: str = ".", **options: Any) -> None:
    with pytest.raises(error, match=match):
        await client.import_images(io.BytesIO(data), **options)
    await nothing_is_left(client)


# ---- OCI layouts


async def test_a_layout_becomes_an_image(client: Client) -> None:
    layout = named()
    (image,) = await client.import_images(io.BytesIO(layout.tar()))
    assert image.name == NAME
    assert image.target.digest == layout.entries[0]["digest"]
    assert image.record.target.annotations == {}
    assert await everything(client) == set(layout.blobs)
    resolved = await image.resolve()
    assert len(resolved.manifest.layers) == 2
    manifest = await client.content.info(image.target.digest)
    assert manifest.labels == {
        "containerd.io/gc.ref.content.config": resolved.manifest.config.digest,
        "containerd.io/gc.ref.content.l.0": resolved.manifest.layers[0].digest,
        "containerd.io/gc.ref.content.l.1": resolved.manifest.layers[1].digest,
    }
    assert await walk(client.leases.walk) == [] and await client.content.statuses() == []


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"])
async def test_an_archive_may_be_compressed(client: Client, pack: Callable[[bytes], bytes]) -> None:
    (image,) = await client.import_images(io.BytesIO(pack(named().tar())))
    assert image.name == NAME


async def test_sources(client: Client, tmp_path: Path) -> None:
    data = named().tar()
    path = tmp_path / "archive.tar"
    path.write_bytes(data)
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()

    async def drops() -> AsyncIterator[bytes]:
        for i in range(0, len(data), 7):
            yield data[i : i + 7]

    for source in (path, str(path), io.BytesIO(data), reader, drops()):
        (image,) = await client.import_images(source)
        assert image.name == NAME
        await image.delete()
    with pytest.raises(NotFound, match="nowhere"):
        await client.import_images(tmp_path / "nowhere")
    with pytest.raises(InvalidArgument, match="binary"):
        await client.import_images(io.StringIO("text"))


async def test_names(client: Client) -> None:
    layout, manifest = small()
    layout.name(manifest, full="quay.example/a/b:2")
    layout.name(manifest, tag="v1")
    layout.name(manifest, tag="localhost:5000/c:3")
    layout.name(manifest)
    data = layout.tar()
    names = {image.name for image in await client.import_images(io.BytesIO(data))}
    dated = next(name for name in names if "import-" in name)
    assert dated.startswith("docker.io/library/import-2") and dated.endswith(":v1")
    assert names - {dated} == {"quay.example/a/b:2", "localhost:5000/c:3"}
    named = await client.import_images(io.BytesIO(data), base_name="quay.example/a/b", digests=True)
    assert sorted(image.name for image in named) == [
        "quay.example/a/b:2", "quay.example/a/b:v1", f"quay.example/a/b@{manifest['digest']}",
    ]  # fmt: skip


async def test_an_archive_without_names_needs_one(client: Client) -> None:
    layout, manifest = small()
    layout.name(manifest)
    await refuses(client, layout.tar(), InvalidArgument, "no names")
    (image,) = await client.import_images(io.BytesIO(layout.tar()), base_name="small", digests=True)
    assert image.name == f"docker.io/library/small@{manifest['digest']}"
    (index,) = await client.import_images(io.BytesIO(layout.tar()), index_name="docker.io/library/all:1")
    assert (index.name, (await index.resolve()).descriptor.digest) == ("docker.io/library/all:1", manifest["digest"])


async def test_names_outside_of_the_base_are_told(client: Client) -> None:
    await refuses(client, named().tar(), InvalidArgument, "docker.io/library/small:1", base_name="other")


async def test_a_second_import_moves_the_name(client: Client) -> None:
    first = named()
    await client.import_images(io.BytesIO(first.tar()))
    other, manifest = small(text="other")
    other.name(manifest, full=NAME)
    await client.import_images(io.BytesIO(other.tar()), labels={"from": "test"})
    (record,) = await walk(client.images.walk)
    assert (record.target.digest, record.labels) == (manifest["digest"], {"from": "test"})


async def test_an_import_under_way_at_the_same_time(client: Client) -> None:
    data = named().tar()
    found = await asyncio.gather(*(client.import_images(io.BytesIO(data)) for _ in range(4)))
    assert {images[0].name for images in found} == {NAME}


# ---- platforms


def two_platforms() -> tuple[Layout, dict[str, Any], dict[str, Any]]:
    layout = Layout()
    amd, arm = (layout.image([tar_of({"etc/arch": a.encode()})], a) for a in ("amd64", "arm64"))
    layout.name(layout.index({"amd64": amd, "arm64": arm}), full=NAME)
    return layout, amd, arm


async def test_all_platforms_that_an_archive_holds_are_kept(client: Client) -> None:
    layout, amd, arm = two_platforms()
    (image,) = await client.import_images(io.BytesIO(layout.tar()))
    labels = (await client.content.info(image.target.digest)).labels
    assert set(labels.values()) == {amd["digest"], arm["digest"]}


async def test_one_platform_is_kept_alone(client: Client) -> None:
    layout, _, arm = two_platforms()
    platform = Platform(os="linux", architecture="arm64")
    (image,) = await client.import_images(io.BytesIO(layout.tar()), platform=platform)
    labels = (await client.content.info(image.target.digest)).labels
    assert labels == {"containerd.io/gc.ref.content.m.1": arm["digest"]}
    with pytest.raises(NotFound, match="s390x"):
        await client.import_images(io.BytesIO(layout.tar()), platform=Platform(os="linux", architecture="s390x"))


async def test_an_archive_with_one_of_two_platforms(client: Client) -> None:
    layout, amd, _ = two_platforms()
    left_out = [d for d in layout.blobs if d not in reach(layout, amd)]
    index = layout.entries[0]["digest"]
    data = layout.tar(*(d for d in left_out if d != index))
    (image,) = await client.import_images(io.BytesIO(data))
    assert (await client.content.info(image.target.digest)).labels == {
        "containerd.io/gc.ref.content.m.0": amd["digest"]
    }
    with pytest.raises(NotFound, match="incomplete: manifest sha256"):
        await client.import_images(io.BytesIO(data), all_platforms=True)


def reach(layout: Layout, manifest: dict[str, Any]) -> set[str]:
    document = json.loads(layout.blobs[manifest["digest"]])
    return {manifest["digest"], document["config"]["digest"], *(layer["digest"] for layer in document["layers"])}


async def test_an_image_of_another_platform_than_asked_for(client: Client) -> None:
    await refuses(
        client, named("arm64").tar(), NotFound, "no image for linux/amd64",
        platform=Platform(os="linux", architecture="amd64"),
    )  # fmt: skip


# ---- docker's archives


def saved(*, link: Callable[[tarfile.TarFile], None] | None = None, tags: list[str] | None = None) -> bytes:
    """As docker 20 saves: `<id>/layer.tar`, the second one through a link where `link` makes it."""
    layers = [tar_of({"a": b"1"}), tar_of({"b": b"2"})]
    if link is not None:
        layers = [layers[0], layers[0]]
    config = dump({
        "os": "linux", "architecture": "amd64", "config": {"Labels": {"containerd.io/restart.loguri": "binary:///sh"}},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
    })  # fmt: skip
    ids = ["a" * 64, "b" * 64]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for i, layer in enumerate(layers):
            directory = tarfile.TarInfo(ids[i] + "/")
            directory.type = tarfile.DIRTYPE
            archive.addfile(directory)
            add(f"{ids[i]}/VERSION", b"1.0")
            add(f"{ids[i]}/json", b"{}")
            if i == 0 or link is None:
                add(f"{ids[i]}/layer.tar", layer)
        if link is not None:
            link(archive)
        name = f"{digest_of(config)[7:]}.json"
        add(name, config)
        entry = {"Config": name, "RepoTags": tags or ["small:1", "quay.example/x:2"],
                 "Layers": [f"{i}/layer.tar" for i in ids]}  # fmt: skip
        add("manifest.json", dump([entry]))
        add("repositories", dump({"small": {"1": ids[1]}}))
    return packed.getvalue()


def links(kind: bytes, target: str) -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("b" * 64 + "/layer.tar")
        info.type, info.linkname = kind, target
        archive.addfile(info)

    return add


async def test_docker_save(client: Client) -> None:
    images = await client.import_images(io.BytesIO(saved()))
    assert [image.name for image in images] == [NAME, "quay.example/x:2"]
    resolved = await images[0].resolve()
    assert [layer.media_type for layer in resolved.manifest.layers] == [
        "application/vnd.docker.image.rootfs.diff.tar"
    ] * 2
    assert [layer.digest for layer in resolved.manifest.layers] == list(resolved.config.diff_ids)
    assert images[0].record.labels == {}  # what an image says of itself is not ours (CVE-2026-53488)


@pytest.mark.parametrize(
    "link",
    [links(tarfile.SYMTYPE, f"../{'a' * 64}/layer.tar"), links(tarfile.LNKTYPE, f"{'a' * 64}/layer.tar")],
    ids=["symlink", "hard link"],
)
async def test_docker_save_with_links(client: Client, link: Callable[[tarfile.TarFile], None]) -> None:
    images = await client.import_images(io.BytesIO(saved(link=link)))
    layers = (await images[0].resolve()).manifest.layers
    assert layers[0].digest == layers[1].digest


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../etc/passwd"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
async def test_links_out_are_refused(client: Client, kind: bytes, target: str) -> None:
    await refuses(client, saved(link=links(kind, target)), InvalidArgument, "leads out")


async def test_a_link_to_itself(client: Client) -> None:
    await refuses(client, saved(link=links(tarfile.SYMTYPE, "layer.tar")), InvalidArgument, "leads nowhere")


async def test_docker_layers_may_be_compressed(client: Client) -> None:
    plain = tar_of({"a": b"1" * 10000})
    layers = {"0.tar": gzip.compress(plain), "1.tar": zstandard.ZstdCompressor().compress(plain), "2.tar": plain}
    config = dump({"os": "linux", "architecture": "amd64",
                   "rootfs": {"type": "layers", "diff_ids": [digest_of(plain)] * 3}})  # fmt: skip
    entry = {"Config": "c.json", "RepoTags": ["small:1"], "Layers": [*layers]}
    (image,) = await client.import_images(
        io.BytesIO(tar_of({"manifest.json": dump([entry]), "c.json": config, **layers}))
    )
    types = [layer.media_type.rpartition(".")[2] for layer in (await image.resolve()).manifest.layers]
    assert types == ["gzip", "zstd", "tar"]


async def test_a_docker_layer_that_is_another(client: Client) -> None:
    config = dump({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest_of(b"?")]}})
    entry = {"Config": "c.json", "RepoTags": ["small:1"], "Layers": ["l.tar"]}
    files = {"manifest.json": dump([entry]), "c.json": config, "l.tar": tar_of({"a": b""})}
    await refuses(client, tar_of(files), DataLoss, "the config says")


@pytest.mark.parametrize("missing", ["Config", "Layers"])
async def test_docker_archives_that_lack_a_file(client: Client, missing: str) -> None:
    layer = tar_of({"a": b"1"})
    config = dump({"os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]}})
    files = {"c.json": config, "l.tar": layer}
    del files["c.json" if missing == "Config" else "l.tar"]
    entry = {"Config": "c.json", "RepoTags": ["small:1"], "Layers": ["l.tar"]}
    await refuses(client, tar_of({**files, "manifest.json": dump([entry])}), NotFound, "c.json|l.tar")


@pytest.mark.parametrize(
    "document",
    [b"{}", b"[]", b"[1]", b"[{}]", b'[{"Config":1}]', b'[{"Config":"c","Layers":"l"}]', b"[[", b'[{"a":1,"a":2}]',
     b'[{"Config":"../c","Layers":[]}]', b'[{"Config":"/c","Layers":[]}]'],
)  # fmt: skip
async def test_docker_manifests_that_are_none(client: Client, document: bytes) -> None:
    await refuses(client, tar_of({"manifest.json": document}), InvalidArgument)


async def test_a_docker_before_1_10(client: Client) -> None:
    files = {"repositories": b"{}", f"{'a' * 64}/layer.tar": tar_of({"a": b""})}
    await refuses(client, tar_of(files), Unimplemented, "before 1.10")


# ---- what is refused


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "oci-layout", "repositories"])
async def test_a_document_of_a_gibibyte_is_refused_at_its_header(client: Client, name: str) -> None:
    info = tarfile.TarInfo(name)
    info.size = 1 << 30
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        yield info.tobuf()
        while True:
            read += 1 << 20
            yield bytes(1 << 20)

    with pytest.raises(ResourceExhausted, match=str(1 << 30)):
        await client.import_images(endless())
    assert read <= 4 << 20
    await nothing_is_left(client)


async def test_a_manifest_blob_of_many_mebibytes(client: Client) -> None:
    layout = Layout()
    big = layout.blob(MANIFEST, b'{"schemaVersion":2,"x":"' + b"x" * (5 << 20) + b'"}')
    layout.name(big, full=NAME)
    await refuses(client, layout.tar(), InvalidArgument, "larger than a document")


async def test_a_pax_header_of_many_mebibytes(client: Client) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    await refuses(client, info.tobuf() + bytes(1 << 20), ResourceExhausted, "extended header")


async def test_endless_extended_headers(client: Client) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XGLTYPE
    await refuses(client, info.tobuf() * 100, InvalidArgument, "extended headers")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "blobs/../../x", "a/../b"])
async def test_names_that_lead_out(client: Client, name: str) -> None:
    layout = named()
    await refuses(client, tar_of({name: b"x", **layout.files()}), InvalidArgument, "leads out of the archive")


async def test_devices_and_strange_files_are_passed_over(client: Client) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"):
            info = tarfile.TarInfo(f"device-{kind!r}")
            info.type = kind
            archive.addfile(info)
        for name, data in {"./README": b"hello", **named().files()}.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (image,) = await client.import_images(io.BytesIO(packed.getvalue()))
    assert image.name == NAME


@pytest.mark.parametrize("part", ["config", "layer", "manifest"])
async def test_what_is_missing_is_named(client: Client, part: str) -> None:
    layout = named()
    manifest = layout.entries[0]
    document = json.loads(layout.blobs[manifest["digest"]])
    gone = {"config": document["config"], "layer": document["layers"][1], "manifest": manifest}[part]
    await refuses(client, layout.tar(gone["digest"]), NotFound, f"incomplete: {part} {gone['digest']}")


async def test_a_blob_that_is_not_what_its_name_says(client: Client) -> None:
    layout = named()
    layer = next(d for d, data in layout.blobs.items() if data.startswith(b"etc/"))
    layout.blobs[layer] = layout.blobs[layer][:-1] + b"!"
    await refuses(client, layout.tar(), DataLoss, "not what its name says")
    assert layer not in await everything(client)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
async def test_archives_that_are_cut_off(client: Client, share: float) -> None:
    data = named().tar().rstrip(b"\0")
    with pytest.raises((DataLoss, NotFound, InvalidArgument)):
        await client.import_images(io.BytesIO(data[: int(len(data) * share)]))
    await nothing_is_left(client)
    packed = gzip.compress(data)
    await refuses(client, packed[: len(packed) // 2], DataLoss, "cut off")


async def test_a_compressed_archive_that_is_corrupt(client: Client) -> None:
    packed = bytearray(gzip.compress(named().tar()))
    packed[len(packed) // 2] ^= 0xFF
    with pytest.raises(WherryError):
        await client.import_images(io.BytesIO(bytes(packed)))
    await nothing_is_left(client)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"])
async def test_a_bomb(client: Client, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wherry.compression.RATIO_AFTER", 1 << 20)
    info = tarfile.TarInfo("bomb")
    info.size = 30 << 20
    data = pack(info.tobuf() + bytes(info.size))
    assert len(data) * 1000 < info.size
    await refuses(client, data, ResourceExhausted, "1000 times")


@pytest.mark.parametrize(
    "data", [b"", b"hello" * 1000, bytes(10240), tar_of({"a": b"1"}), tar_of({"index.json": b"{}"})]
)
async def test_what_is_no_archive(client: Client, data: bytes) -> None:
    await refuses(client, data, InvalidArgument)


async def test_documents_that_come_twice(client: Client) -> None:
    files = list(named().files().items())
    await refuses(client, tar_of([*files, files[1]]), InvalidArgument, "ambiguous")


async def test_a_name_for_two_images(client: Client) -> None:
    layout, first = small()
    layout.name(first, full=NAME)
    layout.name(layout.image([tar_of({"x": b"x"})]), full=NAME)
    await refuses(client, layout.tar(), InvalidArgument, "names two images")


async def test_a_manifest_that_is_an_index_too(client: Client) -> None:
    layout = Layout()
    document = {"schemaVersion": 2, "config": layout.config([]), "layers": [], "manifests": []}
    layout.name(layout.blob(MANIFEST, dump(document)), full=NAME)
    await refuses(client, layout.tar(), InvalidArgument, "ambiguous")


async def test_an_index_that_names_itself_in_circles(client: Client) -> None:
    layout, manifest = small()
    for _ in range(8):
        manifest = layout.index({"amd64": manifest})
    layout.name(manifest, full=NAME)
    await refuses(client, layout.tar(), InvalidArgument, "nested deeper")


@pytest.mark.parametrize("name", ["UPPER", "a b", "\x1b[31mred", "x" * 300, "a//b:1"])
async def test_names_that_are_none(client: Client, name: str) -> None:
    layout, manifest = small()
    layout.name(manifest, full=name)
    await refuses(client, layout.tar(), InvalidArgument)


@pytest.mark.parametrize(
    "key", ["io.kubernetes.cri-o.annotations.checkpoint.name", "org.criu.checkpoint.container.name",
            "io.podman.annotations.checkpoint.name"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["entry", "manifest"])
async def test_checkpoints(client: Client, key: str, place: str) -> None:
    layout = Layout()
    layer = tar_of({"config.dump": b"{}"})
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": layout.config([layer]),
                "layers": [layout.blob(LAYER, layer)]}  # fmt: skip
    if place == "manifest":
        document["annotations"] = {key: "victim"}
    manifest = layout.blob(MANIFEST, dump(document))
    layout.name(manifest, full=NAME, **({key: "victim"} if place == "entry" else {}))
    await refuses(client, layout.tar(), Unimplemented, "checkpoint")


async def test_containerds_own_checkpoints(client: Client) -> None:
    layout = Layout()
    part = layout.blob("application/vnd.containerd.container.criu.checkpoint.criu.tar", b"criu")
    layout.name(layout.index({"amd64": part}), full=NAME)
    await refuses(client, layout.tar(), Unimplemented, "checkpoint")


async def test_a_layout_of_the_future(client: Client) -> None:
    files = {**named().files(), "oci-layout": b'{"imageLayoutVersion":"2.0.0"}'}
    await refuses(client, tar_of(files), Unimplemented, "2.0.0")


async def test_a_size_that_is_not_so(client: Client) -> None:
    layout, manifest = small()
    layout.name({**manifest, "size": 7}, full=NAME)
    with pytest.raises(WherryError, match="bytes"):
        await client.import_images(io.BytesIO(layout.tar()))
    await nothing_is_left(client)


async def test_too_many_files(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wherry.archive.intake.UNNAMED_MAX", 20)
    await refuses(client, tar_of({f"f{i}": b"x" for i in range(40)}), ResourceExhausted, "20 files")
    monkeypatch.setattr("wherry.archive.tar.ENTRIES_MAX", 20)
    await refuses(client, tar_of({f"f{i}": b"" for i in range(40)}), ResourceExhausted, "20 entries")


async def test_a_caller_who_goes_away(client: Client) -> None:
    data = named().tar()
    halfway = asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        yield data[: len(data) // 2]
        halfway.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(client.import_images(stuck()))
    await halfway.wait()
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await nothing_is_left(client)


# ---- the reader alone, against anything


def damaged(data: bytes, cuts: list[tuple[int, int]]) -> bytes:
    made = bytearray(data)
    for place, value in cuts:
        made[place % len(made)] = value
    return bytes(made)


def entry_of(kind: bytes, size: int, body: bytes) -> bytes:
    """A header whose checksum is right, and a body that may be of another length than it says."""
    info = tarfile.TarInfo("name")
    info.type, info.size = kind if kind != b"x" or size % 2 else tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=2048),
        st.lists(
            st.builds(entry_of, st.binary(min_size=1, max_size=1), st.integers(-5, 3000), st.binary(max_size=1500))
        ).map(b"".join),
        st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=20).map(
            lambda cuts: damaged(tar_of({"oci-layout": b"{}", "x" * 150: b"1" * 700, "\u00e9": b""}), cuts)
        ),
    ),
    st.integers(1, 600),
)
def test_any_bytes_end_in_entries_or_an_error_of_the_house(data: bytes, step: int) -> None:
    async def drops() -> AsyncIterator[bytes]:
        for i in range(0, len(data), step):
            yield data[i : i + step]

    async def read() -> None:
        reader = Reader(drops(), "it")
        with contextlib.suppress(WherryError):
            async for entry in reader:
                assert not entry.name.startswith("/") and ".." not in entry.name.split("/")
                body = [piece async for piece in reader.body()]
                assert sum(map(len, body)) == entry.size <= len(data)

    asyncio.run(read())
