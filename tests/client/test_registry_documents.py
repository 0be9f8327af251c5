"""Manifests, indexes and configs of strangers: what is ambiguous, oversized or malformed is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from wherry.registry import (
    default_platform,
    document_type,
    parse_config,
    parse_index,
    parse_manifest,
    parse_object,
    parse_platform,
    pick,
)
from wherry.registry.documents import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from wherry_shared.errors import InvalidArgument, NotFound, ResourceExhausted, Unimplemented
from wherry_shared.values import Descriptor, Platform

DIGEST = "sha256:" + "ab" * 32
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"


def entry(**changes: Any) -> dict[str, Any]:
    return {"mediaType": LAYER, "digest": DIGEST, "size": 10} | changes


def manifest(**changes: Any) -> bytes:
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": entry(), "layers": [entry()]}
    return json.dumps(document | changes).encode()


def index(children: list[dict[str, Any]], **changes: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children} | changes).encode()


def test_the_four_types_are_read() -> None:
    parsed = parse_manifest(manifest(annotations={"a": "b"}), OCI_MANIFEST)
    assert (parsed.config.digest, parsed.layers[0].size, parsed.annotations) == (DIGEST, 10, {"a": "b"})
    assert parse_manifest(manifest(mediaType=DOCKER_MANIFEST)).media_type == DOCKER_MANIFEST
    child = entry(
        platform={"os": "linux", "architecture": "arm", "variant": "v7", "os.version": "1", "os.features": ["f"]}
    )
    assert parse_index(index([child])).manifests[0].platform == Platform(
        os="linux", architecture="arm", variant="v7", os_version="1", os_features=["f"]
    )
    assert parse_index(index([], mediaType=DOCKER_LIST), DOCKER_LIST + "; charset=utf-8").media_type == DOCKER_LIST


def test_the_type_comes_from_header_document_or_shape() -> None:
    bare = json.dumps({"schemaVersion": 2, "config": entry(), "layers": []}).encode()
    assert document_type(bare) == OCI_MANIFEST
    assert document_type(bare, DOCKER_MANIFEST) == DOCKER_MANIFEST
    assert document_type(json.dumps({"schemaVersion": 2, "manifests": []}).encode(), "application/json") == OCI_INDEX
    for raw, header in [
        (manifest(), "application/vnd.docker.distribution.manifest.v1+prettyjws"),
        (b'{"schemaVersion": 1, "fsLayers": []}', ""),
        (manifest(mediaType="application/vnd.other+json"), ""),
        (manifest(), "application/vnd.other+json"),
        (manifest(), "text/html"),
    ]:
        with pytest.raises(Unimplemented):
            document_type(raw, header)


@pytest.mark.parametrize(
    "raw",
    [
        manifest(manifests=[entry()]),
        manifest(manifests=[]),
        manifest(mediaType=None, manifests=[entry()]),
        index([entry()], layers=[entry()]),
        index([entry()], config=entry()),
        manifest(fsLayers=[]),
        b'{"schemaVersion": 2, "layers": [], "config": {}, "layers": []}',
        b'{"schemaVersion": 2, "schemaVersion": 2}',
    ],
)
def test_an_ambiguous_document_is_refused(raw: bytes) -> None:
    for header in ("", OCI_MANIFEST, OCI_INDEX):
        with pytest.raises(InvalidArgument):
            document_type(raw, header)


@pytest.mark.parametrize(("header", "own"), [(OCI_INDEX, OCI_MANIFEST), (DOCKER_MANIFEST, OCI_MANIFEST)])
def test_header_and_document_must_agree(header: str, own: str) -> None:
    with pytest.raises(InvalidArgument, match="ambiguous"):
        document_type(manifest(mediaType=own), header)


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "sha256:" + "AB" * 32},
        {"digest": "sha256:" + "ab" * 31},
        {"digest": "sha1:" + "ab" * 20},
        {"digest": "sha512:" + "ab" * 32},
        {"digest": "sha256:" + "ab" * 32 + "\n"},
        {"digest": "../" + DIGEST},
        {"digest": 7},
        {"digest": None},
        {"size": -1},
        {"size": True},
        {"size": 1.0},
        {"size": "10"},
        {"size": None},
        {"size": 1 << 63},
        {"mediaType": ""},
        {"mediaType": None},
        {"mediaType": 1},
        {"annotations": []},
        {"annotations": {"a": 1}},
        {"urls": "https://x"},
        {"urls": [1]},
        {"platform": "linux"},
        {"platform": {"os": 1}},
        {"annotations": {"a": "\ud800"}},
    ],
)
def test_a_bad_descriptor_is_refused_and_named(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"layers\[1\]"):
        parse_manifest(manifest(layers=[entry(), entry(**changes)]))
    with pytest.raises(InvalidArgument, match="config"):
        parse_manifest(manifest(config=entry(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": {}},
        {"layers": "x"},
        {"config": None},
        {"config": []},
        {"schemaVersion": 3},
        {"schemaVersion": True},
        {"schemaVersion": "2"},
        {"mediaType": 5},
        {"annotations": []},
    ],
)
def test_a_malformed_manifest_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        parse_manifest(manifest(**changes))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"{}x",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": "\xff"}',
        "{}".encode("utf-16"),
        b'{"a": 1' + b"0" * 5000 + b"}",
        b"{'a': 1}",
        b'{"a": "\x01"}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_not_strict_json_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidArgument):
        parse_object(raw, "it")


def test_depth_and_size_are_bounded() -> None:
    assert parse_object(b'{"a":' * 63 + b"{}" + b"}" * 63, "it")
    for deep in (64, 65, 900, 50_000):
        with pytest.raises(InvalidArgument, match="deeper"):
            parse_object(b'{"a":' * deep + b"{}" + b"}" * deep, "it")
    with pytest.raises(ResourceExhausted):
        parse_object(b'{"a":"' + b"x" * (4 << 20) + b'"}', "it")
    with pytest.raises(ResourceExhausted):
        parse_object(b'{"a":' + b"[" * (3 << 20), "it")
    for bomb in (b"[]," * 1_000_000, b"1," * 1_500_000, b'{"a":0},' * 300_000):
        with pytest.raises(ResourceExhausted):
            parse_object(b'{"a":[' + bomb + b"0]}", "it")


def test_counts_are_bounded() -> None:
    assert len(parse_manifest(manifest(layers=[entry()] * 512)).layers) == 512
    with pytest.raises(ResourceExhausted):
        parse_manifest(manifest(layers=[entry()] * 513))
    assert len(parse_index(index([entry()] * 1000)).manifests) == 1000
    with pytest.raises(ResourceExhausted):
        parse_index(index([entry()] * 1001))
    with pytest.raises(ResourceExhausted):
        parse_config(json.dumps({"rootfs": {"diff_ids": [DIGEST] * 513}}).encode())


def test_foreign_layers_are_refused_unless_asked_for() -> None:
    raw = manifest(layers=[entry(mediaType=FOREIGN, urls=["https://elsewhere.example/x"])])
    with pytest.raises(Unimplemented, match="foreign"):
        parse_manifest(raw)
    assert parse_manifest(raw, foreign=True).layers[0].urls == ["https://elsewhere.example/x"]


def test_a_config_is_read() -> None:
    raw = json.dumps(
        {
            "os": "linux",
            "architecture": "arm64",
            "variant": "v8",
            "created": "2020-01-01T00:00:00Z",
            "config": {
                "Env": ["A=b"],
                "Cmd": ["sh"],
                "Entrypoint": None,
                "User": "1:2",
                "WorkingDir": "/w",
                "Labels": {"k": "v"},
                "Volumes": {"/data": {}},
                "ExposedPorts": {"80/tcp": {}},
                "StopSignal": "SIGINT",
            },
            "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
            "history": [{"created_by": "x"}],
        }
    ).encode()
    config = parse_config(raw)
    assert config.platform == Platform(os="linux", architecture="arm64", variant="v8")
    assert (config.env, config.cmd, config.entrypoint, config.user) == (("A=b",), ("sh",), (), "1:2")
    assert (config.volumes, config.exposed_ports, config.labels) == (("/data",), ("80/tcp",), {"k": "v"})
    assert (config.diff_ids, config.stop_signal, config.working_dir) == ((DIGEST,), "SIGINT", "/w")
    assert parse_config(b"{}").diff_ids == ()


@pytest.mark.parametrize(
    "bad",
    [
        {"rootfs": {"diff_ids": ["sha256:XYZ"]}},
        {"rootfs": {"diff_ids": "x"}},
        {"rootfs": {"type": "zip"}},
        {"rootfs": []},
        {"config": {"Env": "A=b"}},
        {"config": {"Env": [1]}},
        {"config": {"Cmd": {}}},
        {"config": {"User": 0}},
        {"config": {"Labels": {"a": None}}},
        {"config": {"Volumes": []}},
        {"os": 1},
    ],
)
def test_a_bad_config_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        parse_config(json.dumps(bad).encode())


def child(text: str, digest: str = "", **changes: Any) -> Descriptor:
    os, architecture, *variant = text.split("/")
    return Descriptor(
        media_type=OCI_MANIFEST,
        digest=digest or DIGEST,
        size=1,
        platform=Platform(os=os, architecture=architecture, variant="".join(variant)),
        **changes,
    )


@pytest.mark.parametrize(
    ("wanted", "offered", "best"),
    [
        ("linux/amd64", ["windows/amd64", "linux/arm64", "linux/amd64"], 2),
        ("linux/x86_64", ["linux/386", "linux/amd64"], 1),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64"], 2),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v4", "linux/amd64/v2"], 2),
        ("linux/amd64/v3", ["linux/amd64/v3", "linux/amd64"], 0),
        ("linux/arm64", ["linux/arm/v7", "linux/arm64/v8"], 1),
        ("linux/arm64/v8", ["linux/arm64"], 0),
        ("linux/arm64", ["linux/arm/v6", "linux/arm/v7"], 1),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/arm64"], 1),
        ("linux/arm", ["linux/arm/v7", "linux/arm/v6"], 0),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5"], 1),
        ("linux/aarch64", ["linux/amd64", "linux/arm64"], 1),
        ("linux/s390x", ["linux/s390x", "linux/s390x"], 0),
        ("linux/amd64", ["unknown/unknown", "linux/amd64"], 1),
    ],
)
def test_the_best_child_is_picked(wanted: str, offered: list[str], best: int) -> None:
    children = [child(text) for text in offered]
    assert pick(children, parse_platform(wanted)) is children[best]


def test_attestations_are_never_picked_and_platformless_children_come_last() -> None:
    bare = Descriptor(media_type=OCI_MANIFEST, digest=DIGEST, size=1)
    attestation = child("unknown/unknown")
    annotated = child("linux/amd64", annotations={"vnd.docker.reference.type": "attestation-manifest"})
    want = parse_platform("linux/amd64")
    assert pick([attestation, annotated, bare], want) is bare
    last = child("linux/386")
    assert pick([bare, last], want) is last
    with pytest.raises(NotFound, match=r"linux/amd64/v1.*linux/s390x"):
        pick([attestation, annotated, child("linux/s390x")], want)
    with pytest.raises(NotFound, match="none"):
        pick([attestation], want)


def test_platforms_are_parsed() -> None:
    assert parse_platform("arm64") == Platform(os=default_platform().os, architecture="arm64", variant="v8")
    assert parse_platform("linux/armhf").variant == "v7"
    assert pick([child(f"{default_platform().os}/{default_platform().architecture}")])
    for bad in ("", "/", "linux/", "linux/amd64/v1/x", "linux/am d64", "linux//v1", "linux/amd64\n"):
        with pytest.raises(InvalidArgument):
            parse_platform(bad)
