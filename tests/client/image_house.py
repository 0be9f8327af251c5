"""What images live in, without a node: the real content, image, lease and snapshot services on one bus in memory."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from rebuilt import event_stream
from wherry.client import Address, Client
from wherry_content.__main__ import build as build_content
from wherry_image.__main__ import build as build_image
from wherry_lease.__main__ import build as build_lease
from wherry_shared.bus import Bus
from wherry_shared.memory import MemoryTransport
from wherry_shared.runtime import Host, Settings
from wherry_snapshot.__main__ import build as build_snapshot

NODE = "n1"
BUILDERS = {"lease": build_lease, "content": build_content, "image": build_image, "snapshot": build_snapshot}
OCI = "application/vnd.oci.image"
CONFIG = f"{OCI}.config.v1+json"
MANIFEST = f"{OCI}.manifest.v1+json"
INDEX = f"{OCI}.index.v1+json"
LAYER = f"{OCI}.layer.v1.tar"


@asynccontextmanager
async def house(root: Path, namespace: str = "default") -> AsyncIterator[Client]:
    """A client of services on `root`."""
    bus: Bus = Bus(MemoryTransport(), node=NODE)
    await event_stream(bus)
    async with AsyncExitStack() as stack:
        for name, build in BUILDERS.items():
            settings = Settings(name, NODE, root / "root", root / "state", "", root / "creds", options={})
            host = Host(settings, bus, stack)
            service: Any = await build(host)
            for second in host.also:
                await bus.serve(second, instance=host.instance)
            server = await bus.serve(service, instance=host.instance, metadata=host.metadata)
            stack.push_async_callback(server.drain)
        # A tenant makes no namespaces and asks for no defaults, so the service of those is not needed.
        yield Client(bus, namespace, Address("", NODE, root / "tenant.nk", root))
        await bus.drain()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def tar_of(files: dict[str, bytes] | Iterable[tuple[str, bytes]]) -> bytes:
    """A tar of these files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class Layout:
    """Makes the files of an OCI layout."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.entries: list[dict[str, Any]] = []

    def blob(self, media_type: str, data: bytes, **more: Any) -> dict[str, Any]:
        self.blobs[digest_of(data)] = data
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}

    def config(self, layers: list[bytes], architecture: str = "amd64", **config: Any) -> dict[str, Any]:
        made = {
            "os": "linux", "architecture": architecture, "config": config,
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
        }  # fmt: skip
        return self.blob(CONFIG, dump(made))

    def image(self, layers: list[bytes], architecture: str = "amd64", **config: Any) -> dict[str, Any]:
        """A manifest of uncompressed layers."""
        made = {
            "schemaVersion": 2, "mediaType": MANIFEST, "config": self.config(layers, architecture, **config),
            "layers": [self.blob(LAYER, layer) for layer in layers],
        }  # fmt: skip
        return self.blob(MANIFEST, dump(made))

    def index(self, children: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """An index: architecture -> manifest."""
        listed = [{**m, "platform": {"os": "linux", "architecture": a}} for a, m in children.items()]
        return self.blob(INDEX, dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}))

    def name(self, target: dict[str, Any], **annotations: str) -> None:
        """Put it into `index.json`: `full` is containerd's annotation, `tag` OCI's."""
        keys = {"full": "io.containerd.image.name", "tag": "org.opencontainers.image.ref.name"}
        own = {keys.get(key, key): value for key, value in annotations.items()}
        self.entries.append({**target, "annotations": own} if own else target)

    def files(self) -> dict[str, bytes]:
        named = {f"blobs/{digest.replace(':', '/')}": data for digest, data in self.blobs.items()}
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self.entries}
        return {"oci-layout": dump({"imageLayoutVersion": "1.0.0"}), "index.json": dump(index), **named}

    def tar(self, *without: str) -> bytes:
        """The archive, without the blobs of these digests."""
        left = {f"blobs/{digest.replace(':', '/')}" for digest in without}
        return tar_of({name: data for name, data in self.files().items() if name not in left})


def small(architecture: str = "amd64", text: str = "hello") -> tuple[Layout, dict[str, Any]]:
    """A layout with one image of two layers."""
    made = Layout()
    layers = [tar_of({"etc/name": text.encode()}), tar_of({"etc/more": text.encode() * 1000})]
    return made, made.image(layers, architecture)


async def everything(client: Client) -> set[str]:
    """All digests in content."""
    from wherry.client import walk

    return {blob.digest for blob in await walk(client.content.walk)}
