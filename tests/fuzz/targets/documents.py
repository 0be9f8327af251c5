"""Manifests, indexes, configs, docker's manifest.json. No bytes are a manifest and an index too (CVE-2021-41190)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from wherry.archive.docker import parse_manifest_file
from wherry.archive.names import Namer
from wherry.registry import documents, labels, platforms
from wherry_shared.errors import InvalidArgument, NotFound, ResourceExhausted, Unimplemented

from ..given import Given

DIGEST = "sha256:" + "a" * 64
TYPES = ("", "application/json", documents.OCI_INDEX, documents.OCI_MANIFEST, documents.DOCKER_LIST, "text/html; q=1")
ALLOWED = (InvalidArgument, ResourceExhausted, Unimplemented)
WORDS = (
    "schemaVersion", "mediaType", "manifests", "layers", "config", "digest", "size", "annotations", "urls",
    "platform", "os", "architecture", "os.version", "os.features", "variant", "rootfs", "diff_ids", "Env", "Labels",
    "Volumes", "RepoTags", "Layers", "Config", "fsLayers", documents.OCI_INDEX, documents.OCI_MANIFEST, DIGEST,
    "\ud800", "io.containerd.image.name", "org.opencontainers.image.ref.name",
)  # fmt: skip
VALUES = (b"2", b"null", b"1e999", b"-0", b"NaN", b"[[[[[[[[", b'{"":{"":{"":', b"\\ud800", b":", b",", b"[]", b"{}")
TOKENS = (*(json.dumps(word).encode() for word in WORDS), *VALUES)


def seeds() -> Iterator[bytes]:
    one_of = {"mediaType": documents.OCI_MANIFEST, "digest": DIGEST, "size": 7}
    child = {**one_of, "platform": {"os": "linux", "architecture": "amd64"}, "annotations": {
        "io.containerd.image.name": "a/b:c", "org.opencontainers.image.ref.name": "7"}}  # fmt: skip
    layer = {**one_of, "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "urls": ["https://a/b"]}
    config = {**one_of, "mediaType": "application/vnd.oci.image.config.v1+json"}
    made: list[Any] = [
        {"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": [child], "annotations": {"a": "b"}},
        {"schemaVersion": 2, "mediaType": documents.OCI_MANIFEST, "config": config, "layers": [layer, layer]},
        {"os": "linux", "architecture": "arm", "variant": "v7", "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
         "config": {"Env": ["A=b"], "User": "1:1", "Labels": {"a": "b"}, "Volumes": {"/v": {}}, "Cmd": ["x"]}},
        [{"Config": "c.json", "RepoTags": ["a:b"], "Layers": ["l/layer.tar"]}],
    ]  # fmt: skip
    yield from (bytes([kind]) + json.dumps(value).encode() for kind in range(len(TYPES)) for value in made)


def one(data: bytes) -> None:
    given = Given(data)
    announced = given.one_of(TYPES)
    raw = given.rest()
    index = tried(lambda: documents.parse_index(raw, announced))
    manifest = tried(lambda: documents.parse_manifest(raw, announced, foreign=True))
    kind = tried(lambda: documents.document_type(raw, announced))
    config = tried(lambda: documents.parse_config(raw))
    assert index is None or manifest is None, "one blob, two images"
    if index is not None:
        assert kind == index.media_type
        labels.children(index.manifests)
        for child in index.manifests:
            tried(lambda child=child: Namer("a/b").of_annotations(child.annotations, child.digest))  # type: ignore[misc]
        tried(lambda: platforms.pick(index.manifests), NotFound)
    if manifest is not None:
        assert kind == manifest.media_type
        labels.children([manifest.config, *manifest.layers])
    for value in (index, manifest, config):
        repr(value).encode()  # a text that cannot be encoded would fail far from here
    for saved in tried(lambda: parse_manifest_file(raw)) or ():
        tried(lambda saved=saved: Namer("a/b").of_tags(saved.tags, DIGEST))  # type: ignore[misc]


def tried(parse: Callable[[], Any], *more: type[Exception]) -> Any:
    try:
        return parse()
    except (*ALLOWED, *more) as error:
        str(error).encode()  # it has to travel
        return None
