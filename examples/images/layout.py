"""Images as OCI layout directories: written once, renamed into place, read by everything else.

The layout (image-spec, image-layout.md) is what this package calls an image: `oci-layout`, `index.json` with one
descriptor, and `blobs/sha256/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .layer import Entry, Layer, ordered, write_layer

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
_CREATED = "2023-06-10T00:00:00Z"

Descriptor = dict[str, Any]


@dataclass(frozen=True)
class Image:
    """A finished image in its layout directory."""

    path: Path

    @property
    def root(self) -> Descriptor:
        """The descriptor of the image: a manifest, or an index for several platforms."""
        found: Descriptor = self._json("index.json")["manifests"][0]
        return found

    def blob(self, digest: str) -> Path:
        return self.path / "blobs" / digest.replace(":", "/")

    def document(self, descriptor: Descriptor) -> dict[str, Any]:
        """A manifest, index or configuration, parsed."""
        return self._json(f"blobs/{descriptor['digest'].replace(':', '/')}")

    def manifests(self) -> list[Descriptor]:
        """The image's manifests: of every platform where it is an index."""
        root = self.root
        return self.document(root)["manifests"] if root["mediaType"] == INDEX else [root]

    def layers(self) -> list[Descriptor]:
        """The layers of the first manifest, lowest first."""
        found: list[Descriptor] = self.document(self.manifests()[0])["layers"]
        return found

    def config(self) -> dict[str, Any]:
        """The image configuration of the first manifest."""
        return self.document(self.document(self.manifests()[0])["config"])

    def blobs(self) -> Iterator[Descriptor]:
        """Configurations and layers, each once: what a registry must hold before the manifests."""
        seen: set[str] = set()
        for manifest in map(self.document, self.manifests()):
            for descriptor in (manifest["config"], *manifest["layers"]):
                if descriptor["digest"] not in seen:
                    seen.add(descriptor["digest"])
                    yield descriptor

    def _json(self, name: str) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads((self.path / name).read_bytes())
        return parsed


class Builder:
    """Fills a new layout directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs = path / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)

    def layer(self, entries: Sequence[Entry], encoding: str = "gzip") -> Layer:
        """One layer of these entries, sorted."""
        return write_layer(self.blobs, ordered(entries), (encoding,))[0]

    def store(self, media_type: str, content: bytes | dict[str, Any], **more: Any) -> Descriptor:
        """A blob (a document is written with sorted keys) and its descriptor, with `more` fields in it."""
        data = content if isinstance(content, bytes) else json.dumps(content, indent=1, sort_keys=True).encode()
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data), **more}

    def manifest(self, layers: Sequence[Layer], config: dict[str, Any], architecture: str) -> Descriptor:
        """A manifest of these layers; `config` is the part that OCI's configuration holds under `config`."""
        document = {
            "created": _CREATED,
            "os": "linux",
            "architecture": architecture,
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": _CREATED, "created_by": f"layer {n}"} for n in range(len(layers))],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.store(CONFIG, document),
            "layers": [layer.descriptor for layer in layers],
        }
        return self.store(MANIFEST, manifest, platform={"os": "linux", "architecture": architecture})

    def index(self, manifests: Sequence[Descriptor]) -> Descriptor:
        return self.store(INDEX, {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(manifests)})

    def finish(self, root: Descriptor) -> Image:
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [root]}
        (self.path / "index.json").write_text(json.dumps(index, indent=1, sort_keys=True))
        return Image(self.path)
