"""Pulling: what is fetched and what is not, what keeps it, what is refused. No node: layers stay packed here."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import images
import pytest
from aiohttp import web
from wherry.client import Client, walk
from wherry.registry import Limits
from wherry_shared.api.content import CHUNK
from wherry_shared.api.introspection import Plugin
from wherry_shared.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from wherry_shared.values import Platform

from .image_house import CONFIG, INDEX, LAYER, MANIFEST, Layout, digest_of, dump, everything, small, tar_of
from .registry_store import Store
from .registry_traps import Trap

REF = "containerd.io/gc.ref.content"
SOURCE = "containerd.io/distribution.source"
LARGE = CHUNK + 300_000
"""More than fits into one call."""
HOST = images.architecture()
OTHERS = [name for name in ("amd64", "arm64", "s390x") if name != HOST]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "wherry.registry.client.Limits",
        lambda: Limits(backoff=0.01, retry_after=0.05),
    )


def several() -> tuple[Layout, dict[str, Any], dict[str, dict[str, Any]]]:
    """An index of three platforms that share a layer, and an attestation."""
    layout = Layout()
    shared = tar_of({"shared": b"1"})
    children = {name: layout.image([shared, tar_of({name: b"2"})], name) for name in (HOST, *OTHERS)}
    listed = [{**m, "platform": {"os": "linux", "architecture": name}} for name, m in children.items()]
    about = layout.image([], "unknown")
    listed.append({**about, "platform": {"os": "unknown", "architecture": "unknown"}})
    index = layout.blob(INDEX, dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}))
    return layout, index, children


def parts(layout: Layout, *manifests: dict[str, Any]) -> set[str]:
    """Manifests and all that they name."""
    found = set()
    for manifest in manifests:
        document = json.loads(layout.blobs[manifest["digest"]])
        found |= {manifest["digest"], document["config"]["digest"], *(layer["digest"] for layer in document["layers"])}
    return found


async def labels(client: Client, digest: str) -> dict[str, str]:
    return (await client.content.info(digest)).labels


async def nothing_is_left(client: Client) -> None:
    """No image, no lease, and no ingest that a later pull could not use."""
    assert await walk(client.images.walk) == []
    assert await walk(client.leases.walk) == []


# ---- what comes


async def test_labels_keep_what_is_named_and_say_where_it_came_from(client: Client, store: Store, trap: Trap) -> None:
    layout, index, children = several()
    store.put(layout, index)
    image = await client.pull(f"{trap.address}/team/app:v1")
    assert (image.name, image.target.digest) == (f"{trap.address}/team/app:v1", index["digest"])
    own = {f"{SOURCE}.{trap.address}": "team/app"}
    listed = json.loads(layout.blobs[index["digest"]])["manifests"]
    assert await labels(client, index["digest"]) == own | {
        f"{REF}.m.{i}": child["digest"] for i, child in enumerate(listed)
    }
    manifest = json.loads(layout.blobs[children[HOST]["digest"]])
    assert await labels(client, children[HOST]["digest"]) == own | {
        f"{REF}.config": manifest["config"]["digest"],
        f"{REF}.l.0": manifest["layers"][0]["digest"],
        f"{REF}.l.1": manifest["layers"][1]["digest"],
    }
    for descriptor in (manifest["config"], *manifest["layers"]):
        assert await labels(client, descriptor["digest"]) == own
    assert await everything(client) == {index["digest"], *parts(layout, children[HOST])}
    assert await walk(client.leases.walk) == []


async def test_what_is_here_is_not_fetched_again(client: Client, store: Store, trap: Trap) -> None:
    layout, index, children = several()
    large = layout.image([os.urandom(LARGE)], HOST)
    store.put(layout, index)
    store.put(layout, large, tag="large")
    for tag in ("v1", "large"):
        await client.pull(f"{trap.address}/team/app:{tag}")
    blobs = store.count("GET blobs")
    before = {info.digest: info for info in await walk(client.content.walk)}
    for tag in ("v1", "large"):
        await client.pull(f"{trap.address}/team/app:{tag}")
    assert store.count("GET blobs") == blobs
    assert {info.digest: info for info in await walk(client.content.walk)} == before
    # Another repository adds its name to what is here, and nothing else.
    store.put(layout, index, "other/app")
    await client.pull(f"{trap.address}/other/app:v1")
    assert store.count("GET blobs") == blobs
    for digest in parts(layout, children[HOST]):
        assert (await labels(client, digest))[f"{SOURCE}.{trap.address}"] == "other/app,team/app"


async def test_a_tag_that_moved_moves_the_image(client: Client, store: Store, trap: Trap) -> None:
    for text in ("one", "two"):
        layout, manifest = small(HOST, text)
        store.put(layout, manifest)
        image = await client.pull(f"{trap.address}/team/app:v1")
        assert image.target.digest == manifest["digest"]
    assert len(await walk(client.images.walk)) == 1


async def test_platforms_by_name(client: Client, store: Store, trap: Trap) -> None:
    layout, index, children = several()
    store.put(layout, index)
    wanted = [Platform(os="linux", architecture=name) for name in OTHERS]
    image = await client.pull(f"{trap.address}/team/app:v1", platform=wanted)
    assert await everything(client) == {index["digest"], *parts(layout, *(children[name] for name in OTHERS))}
    for platform in wanted:
        assert (await image.resolve(platform)).descriptor.digest == children[platform.architecture]["digest"]
    with pytest.raises(NotFound):  # this host's is not here, and that harms nobody else
        await image.resolve()
    with pytest.raises(NotFound, match="riscv64"):
        await client.pull(f"{trap.address}/team/app:v1", platform=Platform(os="linux", architecture="riscv64"))
    await client.pull(f"{trap.address}/team/app:v1")
    assert (await image.resolve()).descriptor.digest == children[HOST]["digest"]


async def test_a_node_elsewhere_is_asked_for_its_platform(
    client: Client, store: Store, trap: Trap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a node of another architecture than this host can be driven from here: by an admin, who may ask."""

    async def plugins() -> list[Plugin]:
        other = Platform(os="linux", architecture=OTHERS[0])
        return [Plugin(type="t", id="without"), Plugin(type="t", id="of", platforms=[other])]

    layout, index, children = several()
    store.put(layout, index)
    tenant, admin = client, Client(client.bus, "default", replace(client.address, creds=Path("admin.nk")))
    monkeypatch.setattr(admin.introspection, "plugins", plugins)
    assert (await tenant.platform()).architecture == HOST
    client = tenant.within("default")
    monkeypatch.setattr(client, "platform", admin.platform)
    image = await client.pull(f"{trap.address}/team/app:v1")
    assert await everything(client) == {index["digest"], *parts(layout, children[OTHERS[0]])}
    assert (await image.resolve()).descriptor.digest == children[OTHERS[0]]["digest"]


async def test_all_platforms_are_everything(client: Client, store: Store, trap: Trap) -> None:
    layout, index, _ = several()
    store.put(layout, index)
    await client.pull(f"{trap.address}/team/app:v1", all_platforms=True)
    assert await everything(client) == set(layout.blobs)


async def test_all_metadata_is_everything_but_other_platforms_layers(client: Client, store: Store, trap: Trap) -> None:
    layout, index, children = several()
    store.put(layout, index)
    await client.pull(f"{trap.address}/team/app:v1", all_metadata=True)
    here = await everything(client)
    layers = {d["digest"] for m in children.values() for d in json.loads(layout.blobs[m["digest"]])["layers"]}
    own = {d["digest"] for d in json.loads(layout.blobs[children[HOST]["digest"]])["layers"]}
    assert here == set(layout.blobs) - (layers - own)


@pytest.mark.parametrize("api", [True, False])
async def test_what_refers_to_the_image_comes_when_asked_for(
    client: Client, store: Store, trap: Trap, api: bool
) -> None:
    layout, index, children = several()
    store.put(layout, index)
    store.referrers = api
    about_index, about_manifest = store.refer(index, b"signature"), store.refer(children[HOST], b"sbom")
    if not api:  # the tag that takes the API's place
        for subject in (index, children[HOST]):
            tag = subject["digest"].replace(":", "-")
            store.manifests["team/app"][tag] = (INDEX, store._referring("team/app", subject["digest"]))
    await client.pull(f"{trap.address}/team/app:v1")
    assert about_index["digest"] not in await everything(client)
    await client.pull(f"{trap.address}/team/app:v1", referrers=True)
    assert {about_index["digest"], about_manifest["digest"], digest_of(b"sbom")} <= await everything(client)
    for subject, about in ((index, about_index), (children[HOST], about_manifest)):
        key = f"{REF}.referrer.sha256.{about['digest'][7:19]}"
        assert (await labels(client, subject["digest"]))[key] == about["digest"]
    # Neither config nor layer are an image's: they are kept by plain numbers.
    kept = await labels(client, about_manifest["digest"])
    assert kept[f"{REF}.0"] == digest_of(b"{}") and kept[f"{REF}.1"] == digest_of(b"sbom")


async def test_without_the_api_the_real_registry_serves_the_tag(client: Client, tmp_path: Path) -> None:
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is not installed")
    with images.Registry() as registry:
        reference = registry.push(images.tiny(), "team/app", "v1")
        image = await client.pull(reference, referrers=True)
        assert image.target.digest == images.tiny().root["digest"]


async def test_docker_schema_2(client: Client, store: Store, trap: Trap) -> None:
    layout = Layout()
    docker = "application/vnd.docker"
    layer = layout.blob(f"{docker}.image.rootfs.diff.tar", tar_of({"a": b"1"}))
    config = {**layout.config([tar_of({"a": b"1"})], HOST), "mediaType": f"{docker}.container.image.v1+json"}
    kind = f"{docker}.distribution.manifest"
    made = {"schemaVersion": 2, "mediaType": f"{kind}.v2+json", "config": config, "layers": [layer]}
    manifest = layout.blob(f"{kind}.v2+json", dump(made))
    platform = {"os": "linux", "architecture": HOST}
    listed = {
        "schemaVersion": 2, "mediaType": f"{kind}.list.v2+json", "manifests": [{**manifest, "platform": platform}],
    }  # fmt: skip
    index = layout.blob(f"{kind}.list.v2+json", dump(listed))
    store.put(layout, index)
    image = await client.pull(f"{trap.address}/team/app:v1")
    assert image.target.media_type == f"{kind}.list.v2+json"
    assert await everything(client) == set(layout.blobs)
    assert (await labels(client, manifest["digest"])).keys() == {
        f"{REF}.config", f"{REF}.l.0", f"{SOURCE}.{trap.address}",
    }  # fmt: skip


async def test_foreign_layers_of_other_platforms_are_left_out(client: Client, store: Store, trap: Trap) -> None:
    layout = Layout()
    own = layout.image([tar_of({"a": b"1"})], HOST)
    foreign = {
        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "digest": f"sha256:{'1' * 64}",
        "size": 5, "urls": ["https://169.254.169.254/x"],
    }  # fmt: skip
    made = {"schemaVersion": 2, "mediaType": MANIFEST, "config": layout.config([b""], "x"), "layers": [foreign]}
    windows = layout.blob(MANIFEST, dump(made))
    listed = [
        {**own, "platform": {"os": "linux", "architecture": HOST}},
        {**windows, "platform": {"os": "windows", "architecture": HOST}},
    ]
    index = layout.blob(INDEX, dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}))
    store.put(layout, index)
    await client.pull(f"{trap.address}/team/app:v1", all_platforms=True)
    assert await everything(client) == set(layout.blobs)


# ---- what is refused


async def test_schema_1_is_refused(client: Client, store: Store, trap: Trap) -> None:
    kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    store.manifests["team/app"] = {"v1": (kind, dump({"schemaVersion": 1, "name": "x", "fsLayers": []}))}
    with pytest.raises(Unimplemented, match="schema 1"):
        await client.pull(f"{trap.address}/team/app:v1")
    await nothing_is_left(client)


def deep(levels: int) -> tuple[Layout, dict[str, Any]]:
    layout = Layout()
    child = layout.image([tar_of({"a": b"1"})], HOST)
    for _ in range(levels):
        listed = [{**child, "platform": {"os": "linux", "architecture": HOST}}]
        child = layout.blob(INDEX, dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}))
    return layout, child


async def test_indexes_in_indexes_end_somewhere(client: Client, store: Store, trap: Trap) -> None:
    layout, index = deep(3)
    store.put(layout, index)
    await client.pull(f"{trap.address}/team/app:v1")
    layout, index = deep(4)
    store.put(layout, index, tag="deep")
    with pytest.raises(ResourceExhausted, match="nested"):
        await client.pull(f"{trap.address}/team/app:deep")


async def test_a_cycle_of_indexes_is_met_as_wrong_bytes(client: Client, store: Store, trap: Trap) -> None:
    """A document cannot hold its own digest: who serves a circle has to lie about one."""
    child = {"mediaType": INDEX, "digest": f"sha256:{'0' * 64}", "size": 300}
    body = dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": [child]})
    child["size"] = len(body)
    body = dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": [child]})
    store.manifests["team/app"] = {"v1": (INDEX, body), child["digest"]: (INDEX, body)}
    with pytest.raises((DataLoss, NotFound)):
        await client.pull(f"{trap.address}/team/app:v1", all_platforms=True)
    await nothing_is_left(client)


async def test_a_tree_of_too_many_manifests_is_given_up(
    client: Client, store: Store, trap: Trap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wherry.pull.NODES_MAX", 20)
    layout = Layout()
    leaves = [layout.image([], f"a{i}") for i in range(30)]
    index = layout.index({f"a{i}": leaf for i, leaf in enumerate(leaves)})
    store.put(layout, index)
    with pytest.raises(ResourceExhausted, match="20 manifests"):
        await client.pull(f"{trap.address}/team/app:v1", all_platforms=True)
    await nothing_is_left(client)


async def test_ten_thousand_layers_are_refused(client: Client, store: Store, trap: Trap) -> None:
    layer = {"mediaType": LAYER, "digest": f"sha256:{'1' * 64}", "size": 1}
    made = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {**layer, "mediaType": CONFIG},
        "layers": [layer] * 10_000,
    }
    store.manifests["team/app"] = {"v1": (MANIFEST, dump(made))}
    with pytest.raises(ResourceExhausted, match="layers"):
        await client.pull(f"{trap.address}/team/app:v1")
    assert store.count("GET blobs") == 0
    await nothing_is_left(client)


async def test_a_manifest_that_is_an_index_too_is_refused(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest = small(HOST)
    both = json.loads(layout.blobs[manifest["digest"]]) | {"manifests": []}
    for media_type in (MANIFEST, INDEX, "application/json"):
        body = dump({k: v for k, v in both.items() if k != "mediaType" or media_type == MANIFEST})
        store.manifests["team/app"] = {"v1": (media_type, body)}
        with pytest.raises(InvalidArgument, match="ambiguous"):
            await client.pull(f"{trap.address}/team/app:v1")
    await nothing_is_left(client)


@pytest.mark.parametrize("size", [1000, LARGE])
@pytest.mark.parametrize(
    ("lie", "error"),
    [
        (lambda data: bytes([data[0] ^ 1]) + data[1:], DataLoss),
        (lambda data: data[:-1], DataLoss),
        (lambda data: data + b"x", DataLoss),
        (lambda data: b"", DataLoss),
    ],
)
async def test_a_layer_of_other_bytes_is_not_committed(
    client: Client, store: Store, trap: Trap, size: int, lie: Any, error: type[DataLoss]
) -> None:
    layout = Layout()
    data = os.urandom(size)
    manifest = layout.image([data], HOST)
    store.put(layout, manifest)
    store.blobs["team/app"][digest_of(data)] = lie(data)
    with pytest.raises(error):
        await client.pull(f"{trap.address}/team/app:v1")
    with pytest.raises(NotFound):
        await client.content.info(digest_of(data))
    await nothing_is_left(client)
    # What is left of it does not harm the next pull.
    store.blobs["team/app"][digest_of(data)] = data
    await client.pull(f"{trap.address}/team/app:v1")
    assert await client.content.read(digest_of(data), 0, 1000) == data[:1000]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
async def test_a_layer_that_breaks_off_is_resumed(client: Client, store: Store, trap: Trap, share: float) -> None:
    layout = Layout()
    data = os.urandom(LARGE)
    manifest = layout.image([data], HOST)
    store.put(layout, manifest)
    broken, sent = False, 0

    async def breaks(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        nonlocal broken, sent
        if what != "GET blobs" or not request.path.endswith(digest_of(data)):
            return None
        first = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if broken:
            sent += len(data) - first
            return None
        broken = True
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        part = data[: int(len(data) * share)]
        await response.write(part)
        sent += len(part)
        assert request.transport is not None
        request.transport.close()
        return response

    store.hook = breaks
    await client.pull(f"{trap.address}/team/app:v1")
    assert broken and sent <= len(data) + 65_536
    assert (await client.content.info(digest_of(data))).size == len(data)


async def test_an_interrupted_pull_is_taken_up_by_the_next(client: Client, store: Store, trap: Trap) -> None:
    layout = Layout()
    data = os.urandom(LARGE)
    manifest = layout.image([data], HOST)
    store.put(layout, manifest)
    asked: list[str | None] = []
    away = True

    async def breaks(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        if what != "GET blobs" or not request.path.endswith(digest_of(data)):
            return None
        asked.append(request.headers.get("Range"))
        if not away:
            return None
        if asked[-1] is not None:
            return web.Response(status=503)
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[:500_000])
        assert request.transport is not None
        request.transport.close()
        return response

    store.hook = breaks
    with pytest.raises(Unavailable):
        await client.pull(f"{trap.address}/team/app:v1")
    assert await walk(client.images.walk) == []
    away = False
    asked.clear()
    await client.pull(f"{trap.address}/team/app:v1")
    assert asked == [f"bytes=500000-{len(data) - 1}"]


async def test_layers_are_discarded_only_when_they_are_unpacked(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest = small(HOST)
    store.put(layout, manifest)
    with pytest.raises(InvalidArgument, match="unpacked"):
        await client.pull(f"{trap.address}/team/app:v1", discard_unpacked_layers=True)
    assert store.log == []


@pytest.mark.parametrize("discard", [False, True])
async def test_an_artifact_is_pulled_and_not_unpacked(client: Client, store: Store, trap: Trap, discard: bool) -> None:
    layout = Layout()
    config, text = layout.blob("application/vnd.example.config", b"not JSON"), layout.blob("text/plain", b"hello")
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [text]}
    manifest = layout.blob(MANIFEST, dump(document))
    store.put(layout, manifest)
    await client.pull(
        f"{trap.address}/team/app:v1", unpack=True, snapshotter="overlay", discard_unpacked_layers=discard
    )
    assert set(layout.blobs) == {blob.digest for blob in await walk(client.content.walk)}
    assert {config["digest"], text["digest"]} <= set((await labels(client, manifest["digest"])).values())
