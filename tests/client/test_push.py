"""Pushing: what is sent and what is not, in which order, what is resumed, what is refused."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import pytest
from aiohttp import web
from wherry.client import Client
from wherry.progress import Progress
from wherry.registry import Credentials, Limits, Registry, upload
from wherry.registry.credentials import Given
from wherry_shared.api.image import Image as Record
from wherry_shared.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    WherryError,
)
from wherry_shared.streams import write_blob
from wherry_shared.values import Descriptor, Platform

from .image_house import INDEX, MANIFEST, Layout, digest_of, dump, small, tar_of
from .registry_store import Store
from .registry_traps import Trap, answer, serving

WORD = "s3cret-word"
SOURCE = "containerd.io/distribution.source"
KIB = 1 << 10


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "WHOLE_MAX", 64 * KIB)
    monkeypatch.setattr(upload, "PART", 100 * KIB)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wherry.registry.client.Limits", lambda: Limits(backoff=0.01, retry_after=0.05))


async def have(client: Client, layout: Layout, target: dict[str, Any], name: str = "docker.io/team/app:v1") -> None:
    """The image in content, as an import or a pull leaves it; labels keep nothing here, and nothing collects."""
    for digest, data in layout.blobs.items():
        await write_blob(client.content, digest, data, size=len(data), expected=digest)
    described = Descriptor(media_type=target["mediaType"], digest=target["digest"], size=target["size"])
    await client.images.create(Record(name=name, target=described))


def platforms() -> tuple[Layout, dict[str, Any]]:
    layout = Layout()
    shared = tar_of({"shared": b"1"})
    children = {name: layout.image([shared, tar_of({name: b"2"})], name) for name in ("amd64", "arm64")}
    return layout, layout.index(children)


def large() -> tuple[Layout, dict[str, Any], bytes]:
    layout = Layout()
    data = os.urandom(450 * KIB)
    return layout, layout.image([data]), data


class Told:
    """What a push told."""

    def __init__(self) -> None:
        self.steps: dict[str, str] = {}
        self.most: dict[str, int] = {}

    def __call__(self, progress: Progress) -> None:
        self.steps[progress.name] = progress.step
        self.most[progress.name] = max(self.most.get(progress.name, 0), progress.offset)


# ---- what goes


async def test_an_image_goes_whole_and_its_name_last(client: Client, store: Store, trap: Trap) -> None:
    layout, index = platforms()
    await have(client, layout, index)
    told = Told()
    pushed = await client.push("team/app:v1", f"{trap.address}/new/app:v2", on_progress=told)
    assert (pushed.digest, pushed.media_type) == (index["digest"], INDEX)
    assert store.manifests["new/app"]["v2"] == (INDEX, layout.blobs[index["digest"]])
    documents = {digest for digest, data in layout.blobs.items() if data.startswith(b'{"schemaVersion"')}
    assert store.blobs["new/app"] == {d: data for d, data in layout.blobs.items() if d not in documents}
    assert documents <= store.manifests["new/app"].keys()
    writes = [line for line in store.log if line.startswith("PUT")]
    assert writes == ["PUT uploads"] * 5 + ["PUT manifests"] * 3
    assert trap.requests[-1].path.endswith("/manifests/v2")
    assert all(told.steps[digest] == "uploaded" for digest in store.blobs["new/app"])


async def test_what_is_there_is_not_sent_again(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest = small()
    await have(client, layout, manifest, f"{trap.address}/team/app:v1")
    await client.push(f"{trap.address}/team/app:v1")
    before = len(store.log)
    told = Told()
    await client.push(f"{trap.address}/team/app:v1", on_progress=told)
    assert {line.split()[0] for line in store.log[before:]} == {"HEAD"}
    assert [told.steps[d] for d in store.blobs["team/app"]] == ["exists"] * 3


async def test_a_tag_that_names_something_else_is_moved(client: Client, store: Store, trap: Trap) -> None:
    for text in ("one", "two"):
        layout, manifest = small(text=text)
        await have(client, layout, manifest, f"docker.io/team/{text}:v1")
        await client.push(f"team/{text}:v1", f"{trap.address}/team/app:v1")
        assert digest_of(store.manifests["team/app"]["v1"][1]) == manifest["digest"]


async def test_blobs_are_mounted_from_a_repository_of_the_same_registry(
    client: Client, store: Store, trap: Trap
) -> None:
    layout, manifest = small()
    await have(client, layout, manifest, f"{trap.address}/team/app:v1")
    await client.push(f"{trap.address}/team/app:v1")
    info = await client.content.info(manifest["digest"])
    assert info.labels[f"{SOURCE}.{trap.address}"] == "team/app"
    received, told = store.received, Told()
    await client.push(f"{trap.address}/team/app:v1", f"{trap.address}/other/app:v1", on_progress=told)
    assert store.received == received
    assert [told.steps[d] for d in store.blobs["other/app"]] == ["mounted"] * 3
    info = await client.content.info(manifest["digest"])
    assert info.labels[f"{SOURCE}.{trap.address}"] == "other/app,team/app"
    # A neighbour that has lost it opens an upload instead.
    store.blobs["team/app"].clear()
    store.blobs["other/app"].clear()
    await client.push(f"{trap.address}/team/app:v1", f"{trap.address}/third/app:v1")
    assert len(store.blobs["third/app"]) == 3


async def test_a_neighbour_that_may_not_be_read_is_no_obstacle(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest = small()
    await have(client, layout, manifest, f"{trap.address}/team/app:v1")
    await client.push(f"{trap.address}/team/app:v1")

    async def deny(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        return web.Response(status=403) if "mount" in request.query else None

    store.hook = deny
    await client.push(f"{trap.address}/team/app:v1", f"{trap.address}/other/app:v1")
    assert len(store.blobs["other/app"]) == 3


async def test_a_large_blob_goes_in_parts(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest, data = large()
    await have(client, layout, manifest)
    told = Told()
    await client.push("team/app:v1", f"{trap.address}/team/app:v1", on_progress=told)
    assert store.blobs["team/app"][digest_of(data)] == data
    ranges = [r.headers["Content-Range"] for r in trap.requests if r.method == "PATCH"]
    assert ranges == [
        "0-102399", "102400-204799", "204800-307199", "307200-409599", "409600-460799",
    ]  # fmt: skip
    assert told.most[digest_of(data)] == len(data)


async def test_one_platform_of_several_goes_as_its_manifest(client: Client, store: Store, trap: Trap) -> None:
    layout, index = platforms()
    await have(client, layout, index)
    arm = json.loads(layout.blobs[index["digest"]])["manifests"][1]["digest"]
    pushed = await client.push(
        "team/app:v1", f"{trap.address}/team/app:arm", platform=Platform(os="linux", architecture="arm64")
    )
    assert pushed.digest == arm
    assert store.manifests["team/app"].keys() == {arm, "arm"}
    assert len(store.blobs["team/app"]) == 3


async def test_some_platforms_go_as_an_index_of_them(client: Client, store: Store, trap: Trap) -> None:
    layout = Layout()
    names = ("amd64", "arm64", "s390x")
    index = layout.index({name: layout.image([tar_of({name: b"2"})], name) for name in names})
    await have(client, layout, index)
    wanted = [Platform(os="linux", architecture=name) for name in names[:2]]
    pushed = await client.push("team/app:v1", f"{trap.address}/team/app:two", platform=wanted)
    raw = store.manifests["team/app"]["two"][1]
    assert digest_of(raw) == pushed.digest != index["digest"]
    old = json.loads(layout.blobs[index["digest"]])
    assert json.loads(raw) == old | {"manifests": old["manifests"][:2]}


async def test_what_is_incomplete_is_refused_and_named(client: Client, store: Store, trap: Trap) -> None:
    layout, index = platforms()
    await have(client, layout, index)
    arm = json.loads(layout.blobs[index["digest"]])["manifests"][1]["digest"]
    layer = json.loads(layout.blobs[arm])["layers"][1]["digest"]
    for missing in (layer, arm):
        await client.content.delete(missing)
        with pytest.raises(NotFound, match=missing):
            await client.push("team/app:v1", f"{trap.address}/team/app:v1")
    assert store.log == []
    amd, none = (Platform(os="linux", architecture=name) for name in ("amd64", "s390x"))
    await client.push("team/app:v1", f"{trap.address}/team/app:v1", platform=amd)
    with pytest.raises(NotFound, match="s390x"):
        await client.push("team/app:v1", f"{trap.address}/team/app:v1", platform=none)
    with pytest.raises(NotFound):
        await client.push("no/such:image", f"{trap.address}/team/app:v1")


async def test_a_name_with_another_digest_is_refused(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest = small()
    await have(client, layout, manifest)
    with pytest.raises(InvalidArgument, match="another digest"):
        await client.push("team/app:v1", f"{trap.address}/team/app@sha256:{'0' * 64}")
    await client.push("team/app:v1", f"{trap.address}/team/app@{manifest['digest']}")
    assert store.manifests["team/app"].keys() == {manifest["digest"]}


# ---- trouble


async def test_a_part_that_breaks_off_is_resumed_where_the_registry_is(
    client: Client, store: Store, trap: Trap
) -> None:
    layout, manifest, data = large()
    await have(client, layout, manifest)
    broken = 0

    async def breaks(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        nonlocal broken
        if what == "PATCH uploads" and request.headers["Content-Range"].startswith("102400-"):
            broken += 1
            await store.take(request, request.path.rpartition("/")[2], 30_000)
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return None

    store.hook = breaks
    await client.push("team/app:v1", f"{trap.address}/team/app:v1")
    assert broken == 1
    assert store.blobs["team/app"][digest_of(data)] == data
    starts = [int(r.headers["Content-Range"].split("-")[0]) for r in trap.requests if r.method == "PATCH"]
    assert starts[:2] == [0, 102_400] and 102_400 < starts[2] <= 132_400 and starts == sorted(starts)
    assert store.count("POST uploads") == 2  # the config's, and one for the layer however often it broke


@pytest.mark.parametrize("status", [416, 500, 503, 429])
async def test_a_part_that_is_refused_is_resumed(client: Client, store: Store, trap: Trap, status: int) -> None:
    layout, manifest, data = large()
    await have(client, layout, manifest)
    refused = 0

    async def refuse(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        nonlocal refused
        if what == "PATCH uploads" and refused < 2 and not request.headers["Content-Range"].startswith("0-"):
            refused += 1
            return web.Response(status=status, headers={"Retry-After": "0"})
        return None

    store.hook = refuse
    await client.push("team/app:v1", f"{trap.address}/team/app:v1")
    assert refused == 2
    assert store.blobs["team/app"][digest_of(data)] == data


async def test_a_lost_upload_begins_again(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest, data = large()
    await have(client, layout, manifest)
    lost = False

    async def lose(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        nonlocal lost
        if what == "PATCH uploads" and request.headers["Content-Range"].startswith("204800-") and not lost:
            lost = True
            store.uploads.clear()
            return web.Response(status=500)
        return None

    store.hook = lose
    await client.push("team/app:v1", f"{trap.address}/team/app:v1")
    assert lost and store.blobs["team/app"][digest_of(data)] == data


@pytest.mark.parametrize("status", [400, 405, 501])
async def test_a_registry_that_takes_no_parts_gets_the_whole(
    client: Client, store: Store, trap: Trap, status: int
) -> None:
    layout, manifest, data = large()
    await have(client, layout, manifest)

    async def no_parts(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        return web.Response(status=status) if what == "PATCH uploads" else None

    store.hook = no_parts
    await client.push("team/app:v1", f"{trap.address}/team/app:v1")
    assert store.blobs["team/app"][digest_of(data)] == data


async def test_an_answer_that_got_lost_is_asked_for(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest = small()
    await have(client, layout, manifest)
    lost: set[str] = set()

    async def lose(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        if what != "PUT uploads" or request.query["digest"] in lost:
            return None
        lost.add(request.query["digest"])
        await store._uploads(request, "team/app", request.path.rpartition("/")[2])
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    store.hook = lose
    await client.push("team/app:v1", f"{trap.address}/team/app:v1")
    assert len(lost) == 3 and store.count("POST uploads") == 3


@pytest.mark.parametrize(
    ("what", "status", "error"),
    [
        ("POST uploads", 500, Unavailable), ("POST uploads", 403, PermissionDenied), ("PUT uploads", 500, Unavailable),
        ("PUT uploads", 400, InvalidArgument), ("PATCH uploads", 503, Unavailable),
        ("PATCH uploads", 403, PermissionDenied),
        ("PATCH uploads", 413, FailedPrecondition), ("HEAD blobs", 429, ResourceExhausted),
        ("PUT manifests", 400, InvalidArgument), ("PUT manifests", 502, Unavailable),
        ("HEAD blobs", 401, Unauthenticated),
        ("PATCH uploads", 416, Unavailable),
    ],
)  # fmt: skip
async def test_trouble_that_stays_ends_in_bounded_time(
    client: Client, store: Store, trap: Trap, what: str, status: int, error: type[WherryError]
) -> None:
    layout, manifest, _ = large()
    await have(client, layout, manifest)

    async def always(request: web.BaseRequest, now: str) -> web.StreamResponse | None:
        if now != what:
            # A registry that takes no parts must not take the whole either, or the push would just succeed.
            return web.Response(status=status) if now == "PUT uploads" and what == "PATCH uploads" else None
        return web.Response(status=status, headers={"Retry-After": "0"})

    store.hook = always
    with pytest.raises(error, match=trap.address):
        await client.push("team/app:v1", f"{trap.address}/team/app:v1")
    assert len(store.log) < 40
    assert "v1" not in store.manifests.get("team/app", {})


@pytest.mark.parametrize("what", ["PUT uploads", "PUT manifests"])
async def test_a_registry_that_stores_something_else_is_data_loss(
    client: Client, store: Store, trap: Trap, what: str
) -> None:
    layout, manifest = small()
    await have(client, layout, manifest)

    async def lie(request: web.BaseRequest, now: str) -> web.StreamResponse | None:
        other = {"Docker-Content-Digest": f"sha256:{'0' * 64}"}
        return web.Response(status=201, headers=other) if now == what else None

    store.hook = lie
    with pytest.raises(DataLoss, match=trap.address):
        await client.push("team/app:v1", f"{trap.address}/team/app:v1")


async def test_an_upload_that_claims_more_than_was_sent_is_data_loss(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest, _ = large()
    await have(client, layout, manifest)

    async def lie(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        if what != "PATCH uploads":
            return None
        await request.read()
        return web.Response(status=202, headers={"Location": request.path, "Range": "0-99999999"})

    store.hook = lie
    with pytest.raises(DataLoss, match=trap.address):
        await client.push("team/app:v1", f"{trap.address}/team/app:v1")


# ---- trust


async def with_basic(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
    right = "Basic " + base64.b64encode(f"alice:{WORD}".encode()).decode()
    if request.headers.get("Authorization") == right:
        return None
    return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})


async def test_credentials_are_sent_when_they_are_asked_for(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest, data = large()
    await have(client, layout, manifest)
    store.hook = with_basic
    given = Given(Credentials("alice", WORD), trap.address)
    await client.push("team/app:v1", f"{trap.address}/team/app:v1", credentials=given)
    assert store.blobs["team/app"][digest_of(data)] == data
    wrong = Given(Credentials("alice", "wrong-word"), trap.address)
    with pytest.raises(Unauthenticated) as caught:
        await client.push("team/app:v1", f"{trap.address}/team/app:v2", credentials=wrong)
    assert "wrong-word" not in str(caught.value)


async def test_an_upload_elsewhere_gets_the_bytes_and_no_credentials(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest, data = large()
    await have(client, layout, manifest)
    far = Store(blobs=store.blobs)
    async with serving(far.handle) as elsewhere:

        async def send_away(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
            refused = await with_basic(request, what)
            if refused is not None or what != "POST uploads":
                return refused
            session = f"s{len(far.uploads)}"
            far.uploads[session] = bytearray()
            where = f"{elsewhere.url}/v2/team/app/blobs/uploads/{session}?sig=a%2Fb"
            return web.Response(status=202, headers={"Location": where})

        store.hook = send_away
        given = Given(Credentials("alice", WORD), trap.address)
        await client.push("team/app:v1", f"{trap.address}/team/app:v1", credentials=given)
        assert store.blobs["team/app"][digest_of(data)] == data
        assert elsewhere.authorizations == [] and "?sig=a%2Fb" in elsewhere.requests[0].raw_path


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/x", "https://169.254.169.254/x", "https://10.0.0.1/x", "https://[::]/x",
        "http://upload.example/x", "ftp://a/x", "https://u:p@a.example/x", "", "https://inside.example/x",
    ],
)  # fmt: skip
async def test_an_upload_does_not_go_where_the_registry_may_not_point(
    client: Client, store: Store, trap: Trap, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, manifest = small()
    await have(client, layout, manifest)

    async def lookup(host: str, port: int) -> list[str]:
        return ["10.1.2.3"] if host == "inside.example" else ["8.8.8.8"]

    monkeypatch.setattr("wherry.registry.hosts.system_lookup", lookup)
    monkeypatch.setattr(Registry.__init__, "__kwdefaults__", Registry.__init__.__kwdefaults__ | {"lookup": lookup})

    async def point(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        return web.Response(status=202, headers={"Location": location}) if what == "POST uploads" else None

    store.hook = point
    with pytest.raises((PermissionDenied, FailedPrecondition)):
        await client.push("team/app:v1", f"{trap.address}/team/app:v1")


async def test_the_token_is_for_both_repositories_when_mounting(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest = small()
    await have(client, layout, manifest, f"{trap.address}/team/app:v1")
    await client.push(f"{trap.address}/team/app:v1")
    scopes: list[list[str]] = []

    async def tokens(request: web.BaseRequest) -> web.StreamResponse:
        scopes.append(sorted(request.query.getall("scope")))
        return web.json_response({"token": " ".join(scopes[-1]).replace(" ", "+")})

    async with serving(tokens) as service:

        async def guard(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
            need = ["repository:other/app:pull,push"]
            if "from" in request.query:
                need.append(f"repository:{request.query['from']}:pull")
            held = request.headers.get("Authorization", "").removeprefix("Bearer ").split("+")
            if set(need) <= set(held):
                return None
            challenge = f'Bearer realm="{service.url}/token",service="x",scope="repository:other/app:push,pull"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})

        store.hook = guard
        await client.push(f"{trap.address}/team/app:v1", f"{trap.address}/other/app:v1")
    assert store.blobs["other/app"].keys() == store.blobs["team/app"].keys()
    assert sorted(scopes) == [
        ["repository:other/app:pull,push"], ["repository:other/app:pull,push", "repository:team/app:pull"],
    ]  # fmt: skip


async def test_redirects_of_an_upload_keep_its_method_or_are_refused(client: Client, store: Store, trap: Trap) -> None:
    layout, manifest = small()
    await have(client, layout, manifest)
    status = 302

    async def move(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        if what != "PUT uploads" or "moved" in request.query:
            return None
        return web.Response(status=status, headers={"Location": f"{request.path_qs}&moved=1"})

    store.hook = move
    with pytest.raises(PermissionDenied, match="302"):
        await client.push("team/app:v1", f"{trap.address}/team/app:v1")
    status = 307
    await client.push("team/app:v1", f"{trap.address}/team/app:v1")
    assert len(store.blobs["team/app"]) == 3


async def test_nothing_that_listens_is_unavailable(client: Client) -> None:
    layout, manifest = small()
    await have(client, layout, manifest)
    async with serving(answer(200)) as gone:
        address = gone.address
    with pytest.raises(Unavailable, match=address):
        await client.push("team/app:v1", f"{address}/team/app:v1")


# ---- what is not handed on, and what refers to it


def foreign(url: str) -> tuple[Layout, dict[str, Any], bytes]:
    """An image with a layer of its own, and one that is not handed on."""
    layout, elsewhere = Layout(), tar_of({"licensed": b"1"})
    manifest = layout.image([tar_of({"own": b"1"}), elsewhere])
    made = json.loads(layout.blobs.pop(manifest["digest"]))
    made["layers"][1] |= {"mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar", "urls": [url]}
    return layout, layout.blob(MANIFEST, dump(made)), elsewhere


@pytest.mark.parametrize("here", [True, False])
async def test_a_foreign_layer_stays_where_it_is(client: Client, store: Store, trap: Trap, here: bool) -> None:
    layout, manifest, layer = foreign("https://elsewhere.example/layer")
    if not here:
        del layout.blobs[digest_of(layer)]
    await have(client, layout, manifest)
    await client.push("team/app:v1", f"{trap.address}/team/app:v1")
    assert store.blobs["team/app"].keys() == layout.blobs.keys() - {digest_of(layer), manifest["digest"]}
    sent = json.loads(store.manifests["team/app"]["v1"][1])
    assert sent["layers"][1]["urls"] == ["https://elsewhere.example/layer"]
    await client.push("team/app:v1", f"{trap.address}/team/app:v2", foreign_layers=True)
    assert (digest_of(layer) in store.blobs["team/app"]) is here


@pytest.mark.parametrize("api", [True, False])
async def test_what_refers_to_it_goes_along(client: Client, store: Store, trap: Trap, api: bool) -> None:
    layout, index = platforms()
    store.put(layout, index, "old/app")
    inside = next(d for d, data in layout.blobs.items() if b'"layers":[' in data)
    child = {"mediaType": MANIFEST, "digest": inside, "size": len(layout.blobs[inside])}
    known = {
        index["digest"]: store.refer(index, b"signature", "old/app"),
        inside: store.refer(child, b"sbom", "old/app"),
    }
    await client.pull(f"{trap.address}/old/app:v1", all_platforms=True, referrers=True)
    store.referrers = api
    for _ in range(2):  # again: nothing is listed twice
        await client.push(f"{trap.address}/old/app:v1", f"{trap.address}/new/app:v1", referrers=True)
    for subject, about in known.items():
        assert about["digest"] in store.manifests["new/app"]
        tag = store.manifests["new/app"].get(subject.replace(":", "-"))
        assert (tag is None) is api
        if tag is not None:
            (listed,) = json.loads(tag[1])["manifests"]
            assert (listed["digest"], listed["artifactType"]) == (about["digest"], "text/plain")
    assert digest_of(b"sbom") in store.blobs["new/app"]
