"""`docker save`'s archives: `manifest.json`, and the image manifests that are made of it.

An archive names files, not digests: each layer's and config's digest was found while it was read. The manifest that
is made of an entry is the one containerd makes, byte for byte, so that both tools call the image the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from wherry_shared.errors import InvalidArgument, ResourceExhausted
from wherry_shared.values import Descriptor

from ..compression import Kind
from ..registry import documents

MANIFEST_FILE = "manifest.json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar"
_SUFFIX: dict[Kind, str] = {"none": "", "gzip": ".gzip", "zstd": ".zstd"}
IMAGES_MAX = 1000


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of the archive that is in content now. `kind` is how its bytes are compressed."""

    digest: str
    size: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Saved:
    """An entry of `manifest.json`: file names within the archive."""

    config: str
    tags: list[str]
    layers: list[str]


def parse_manifest_file(raw: bytes) -> list[Saved]:
    """The images of an archive. InvalidArgument, ResourceExhausted: it is none, or names too much."""
    entries = documents.parse_value(raw, MANIFEST_FILE)
    if not isinstance(entries, list) or not entries:
        raise InvalidArgument(f"{MANIFEST_FILE} is not a list of images")
    if len(entries) > IMAGES_MAX:
        raise ResourceExhausted(f"{MANIFEST_FILE} has {len(entries)} images, {IMAGES_MAX} are allowed")
    return [_saved(entry, f"{MANIFEST_FILE}[{i}]") for i, entry in enumerate(entries)]


def _saved(entry: object, what: str) -> Saved:
    if not isinstance(entry, dict):
        raise InvalidArgument(f"{what} is not an object")
    config, layers = entry.get("Config"), _texts(entry, "Layers", what)
    if not isinstance(config, str) or not config:
        raise InvalidArgument(f"{what} names no Config")
    if len(layers) > documents.LAYERS_MAX:
        raise ResourceExhausted(f"{what} has {len(layers)} layers, {documents.LAYERS_MAX} are allowed")
    return Saved(config, _texts(entry, "RepoTags", what), layers)


def _texts(entry: dict[str, Any], key: str, what: str) -> list[str]:
    found = entry.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InvalidArgument(f"{what}: {key} is not a list of strings")
    return found


def make_manifest(config: Stored, layers: Sequence[Stored]) -> bytes:
    """The image manifest (docker's schema 2) of a config and its layers."""
    made = {
        "schemaVersion": 2,
        "mediaType": documents.DOCKER_MANIFEST,
        "config": {"mediaType": CONFIG_TYPE, "digest": config.digest, "size": config.size},
        "layers": [
            {"mediaType": LAYER_TYPE + _SUFFIX[layer.kind], "digest": layer.digest, "size": layer.size}
            for layer in layers
        ],
    }
    return json.dumps(made, separators=(",", ":")).encode()


def make_index(manifests: Iterable[Descriptor]) -> bytes:
    """An OCI index of image manifests."""
    entries = []
    for child in manifests:
        entry: dict[str, Any] = {"mediaType": child.media_type, "digest": child.digest, "size": child.size}
        if child.platform is not None:
            entry["platform"] = platform_json(child)
        entries.append(entry)
    made = {"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": entries}
    return json.dumps(made, separators=(",", ":")).encode()


def platform_json(descriptor: Descriptor) -> dict[str, Any]:
    """A descriptor's platform under OCI's names; empty fields are left out."""
    own = descriptor.platform
    if own is None:
        return {}
    made: dict[str, Any] = {"architecture": own.architecture, "os": own.os}
    made |= {"os.version": own.os_version} if own.os_version else {}
    made |= {"os.features": own.os_features} if own.os_features else {}
    return made | ({"variant": own.variant} if own.variant else {})


def describe(raw: bytes, media_type: str) -> Descriptor:
    """The descriptor of a document of ours."""
    return Descriptor(media_type=media_type, digest=f"sha256:{hashlib.sha256(raw).hexdigest()}", size=len(raw))


def manifest_file(images: Iterable[Saved]) -> bytes:
    """`manifest.json` of these images."""
    made = [{"Config": i.config, "RepoTags": i.tags, "Layers": i.layers} for i in images]
    return json.dumps(made, separators=(",", ":")).encode()
