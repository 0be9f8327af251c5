"""The registry client against Debian's docker-registry: open, behind a password, and behind a line that breaks."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from natsd import free_port
from wherry.registry import Credentials, DockerConfig, Limits, NoCredentials, Reference, Registry, parse_manifest, pick
from wherry.registry.documents import OCI_INDEX, OCI_MANIFEST, parse_config, parse_index
from wherry_shared.errors import DataLoss, InvalidArgument, NotFound, OutOfRange, Unauthenticated, Unavailable
from wherry_shared.values import Descriptor

pytestmark = pytest.mark.skipif(shutil.which("docker-registry") is None, reason="docker-registry is not installed")

WORD = "s3cret-word"
HTPASSWD = "alice:$2b$04$p4Ydb8/7KIdmRJBPwJcX7u.Yd03pKZXygIloKEgij51vmuB5t85Mm\n"  # bcrypt of WORD
LAYER = "application/vnd.oci.image.layer.v1.tar"
FAST = Limits(backoff=0.01)


@asynccontextmanager
async def serving(root: Path, *, password: bool = False) -> AsyncIterator[str]:
    """A docker-registry of our own; gives host:port."""
    address = f"127.0.0.1:{free_port()}"
    (root / "htpasswd").write_text(HTPASSWD)
    auth = {"auth": {"htpasswd": {"realm": "test", "path": str(root / "htpasswd")}}} if password else {}
    config = {
        "version": "0.1", "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(root / "data")}}, "http": {"addr": address},
    } | auth  # fmt: skip
    (root / "config.yml").write_text(json.dumps(config))
    process = await asyncio.create_subprocess_exec(
        "docker-registry", "serve", str(root / "config.yml"),
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await answering(address)
        yield address
    finally:
        process.kill()
        await process.wait()


async def answering(address: str) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(60):
        while True:
            try:
                async with session.get(f"http://{address}/v2/"):
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)


@dataclass
class Pushed:
    index: Descriptor
    manifest: Descriptor
    config: Descriptor
    layer: Descriptor
    data: dict[str, bytes] = field(default_factory=dict)


async def push(address: str, auth: Credentials | None = None, size: int = 3_000_001) -> Pushed:
    """An index with one image of one random layer, as `team/app:v1`."""
    data: dict[str, bytes] = {}

    def keep(media_type: str, raw: bytes) -> Descriptor:
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        data[digest] = raw
        return Descriptor(media_type=media_type, digest=digest, size=len(raw))

    def brief(d: Descriptor) -> dict[str, object]:
        return {"mediaType": d.media_type, "digest": d.digest, "size": d.size}

    layer = keep(LAYER, os.urandom(size))
    config_text = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [layer.digest]}}
    config = keep("application/vnd.oci.image.config.v1+json", json.dumps(config_text).encode())
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": brief(config), "layers": [brief(layer)]}
    manifest = keep(OCI_MANIFEST, json.dumps(body).encode())
    child = brief(manifest) | {"platform": {"os": "linux", "architecture": "amd64"}}
    index = keep(OCI_INDEX, json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [child]}).encode())
    headers = {"Authorization": auth.basic} if auth else {}
    async with aiohttp.ClientSession(headers=headers, raise_for_status=True) as session:
        for blob in (layer, config):
            async with session.post(f"http://{address}/v2/team/app/blobs/uploads/") as begun:
                upload = begun.headers["Location"]
            sign = "&" if "?" in upload else "?"
            async with session.put(f"{upload}{sign}digest={blob.digest}", data=io.BytesIO(data[blob.digest])):
                pass
        for name, d in ((manifest.digest, manifest), ("v1", index)):
            url = f"http://{address}/v2/team/app/manifests/{name}"
            async with session.put(url, data=data[d.digest], headers={"Content-Type": d.media_type}):
                pass
    return Pushed(index, manifest, config, layer, data)


async def whole(registry: Registry, ref: Reference, blob: Descriptor, offset: int = 0, verify: bool = False) -> bytes:
    return b"".join([chunk async for chunk in registry.blob(ref, blob, offset=offset, verify=verify)])


async def test_a_pull_from_the_real_registry(tmp_path: Path) -> None:
    async with serving(tmp_path) as address, Registry(credentials=NoCredentials(), limits=FAST) as registry:
        pushed = await push(address)
        ref = Reference.parse(f"{address}/team/app:v1")
        index, raw = await registry.resolve(ref)
        assert (index, raw) == (pushed.index, pushed.data[pushed.index.digest])
        by_digest = Reference.parse(f"{address}/team/app@{index.digest}")
        assert await registry.resolve(by_digest) == (index, raw)
        child = pick(parse_index(raw, index.media_type).manifests)
        manifest = parse_manifest(await registry.manifest(ref, child), child.media_type)
        assert (manifest.config, manifest.layers) == (pushed.config, (pushed.layer,))
        assert parse_config(await registry.small(ref, manifest.config)).diff_ids == (pushed.layer.digest,)
        data = pushed.data[pushed.layer.digest]
        assert await whole(registry, ref, pushed.layer, verify=True) == data
        for offset in (1, 1_000_000, len(data) - 1, len(data)):
            assert await whole(registry, ref, pushed.layer, offset) == data[offset:]
        seen = hashlib.sha256(data[:777])
        assert b"".join([c async for c in registry.blob(ref, pushed.layer, offset=777, verify=seen)]) == data[777:]


async def test_what_is_not_there_and_what_was_announced_wrongly(tmp_path: Path) -> None:
    async with serving(tmp_path) as address, Registry(credentials=NoCredentials(), limits=FAST) as registry:
        pushed = await push(address)
        ref = Reference.parse(f"{address}/team/app:v1")
        for missing in (f"{address}/team/app:v2", f"{address}/other:v1", f"{address}/team/app@sha256:{'0' * 64}"):
            with pytest.raises(NotFound, match=address):
                await registry.resolve(Reference.parse(missing))
        absent = pushed.layer.model_copy(update={"digest": f"sha256:{'0' * 64}"})
        with pytest.raises(NotFound):
            await whole(registry, ref, absent)
        for wrong in (pushed.layer.size - 1, pushed.layer.size + 1):
            lying = pushed.layer.model_copy(update={"size": wrong})
            for offset in (0, 10):
                with pytest.raises(DataLoss):
                    await whole(registry, ref, lying, offset)
        for wrong in (pushed.manifest.size - 1, pushed.manifest.size + 1):
            with pytest.raises(DataLoss):
                await registry.manifest(ref, pushed.manifest.model_copy(update={"size": wrong}))
        with pytest.raises(DataLoss):
            await registry.small(ref, pushed.config.model_copy(update={"size": 5}))
        with pytest.raises(OutOfRange):
            await whole(registry, ref, pushed.layer, pushed.layer.size + 1)
        with pytest.raises(InvalidArgument):
            await whole(registry, ref, pushed.layer, 5, verify=True)


async def test_leaving_a_download_early_leaves_the_client_usable(tmp_path: Path) -> None:
    async with serving(tmp_path) as address, Registry(credentials=NoCredentials(), limits=FAST) as registry:
        pushed = await push(address)
        ref = Reference.parse(f"{address}/team/app:v1")
        async with aclosing(registry.blob(ref, pushed.layer)) as body:
            async for _ in body:
                break
        assert await whole(registry, ref, pushed.layer) == pushed.data[pushed.layer.digest]


async def test_a_registry_with_a_password(tmp_path: Path) -> None:
    async with serving(tmp_path, password=True) as address:
        pushed = await push(address, Credentials("alice", WORD))
        ref = Reference.parse(f"{address}/team/app:v1")
        packed = base64.b64encode(f"alice:{WORD}".encode()).decode()
        (tmp_path / "config.json").write_text(json.dumps({"auths": {address: {"auth": packed}}}))
        async with Registry(docker_config=tmp_path / "config.json", limits=FAST) as registry:
            assert (await registry.resolve(ref))[0] == pushed.index
            assert await whole(registry, ref, pushed.layer, verify=True) == pushed.data[pushed.layer.digest]
        async with Registry(docker_config=tmp_path / "none.json", limits=FAST) as registry:
            with pytest.raises(Unauthenticated, match=address):
                await registry.resolve(ref)
        async with Registry(credentials=Fixed(Credentials("alice", "wrong-word")), limits=FAST) as registry:
            for _ in range(2):
                with pytest.raises(Unauthenticated) as caught:
                    await registry.resolve(ref)
                assert "wrong-word" not in str(caught.value)
        (tmp_path / "config.json").write_text(json.dumps({"auths": {"127.0.0.1": {"auth": packed}}}))
        with pytest.raises(Unauthenticated):  # another port is another registry
            async with Registry(credentials=DockerConfig(tmp_path / "config.json"), limits=FAST) as registry:
                await registry.resolve(ref)


@dataclass
class Fixed:
    credentials: Credentials

    async def get(self, registry: str) -> Credentials | None:
        return self.credentials


@dataclass
class Line:
    """A TCP relay before the registry that hangs up after as many bytes of each answer as `cuts` says."""

    cuts: list[int]
    forwarded: int = 0
    connections: int = 0

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        self.connections += 1
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            far_writer.write(request[:-2] + b"Connection: close\r\n\r\n")
            left = self.cuts.pop(0) if self.cuts else 1 << 60
            head = await far_reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            while left > 0 and (chunk := await far_reader.read(min(left, 65536))):
                left -= len(chunk)
                self.forwarded += len(chunk)
                writer.write(chunk)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            far_writer.close()


@asynccontextmanager
async def relaying(line: Line, address: str) -> AsyncIterator[str]:
    port = int(address.rpartition(":")[2])
    server = await asyncio.start_server(lambda r, w: line.relay(r, w, port), "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("percent", [30, 60, 90])
async def test_a_dropped_connection_is_resumed_where_it_broke(tmp_path: Path, percent: int) -> None:
    async with serving(tmp_path) as address:
        pushed = await push(address)
        line = Line([pushed.layer.size * percent // 100])
        limits = Limits(backoff=0.01)
        async with relaying(line, address) as cut, Registry(credentials=NoCredentials(), limits=limits) as registry:
            ref = Reference.parse(f"{cut}/team/app:v1")
            assert await whole(registry, ref, pushed.layer, verify=True) == pushed.data[pushed.layer.digest]
        assert line.connections == 2
        assert line.forwarded == pushed.layer.size  # no byte came twice


async def test_many_drops_with_progress_are_survived_and_three_without_are_not(tmp_path: Path) -> None:
    async with serving(tmp_path) as address:
        pushed = await push(address)
        line = Line([100_000] * 10)
        async with relaying(line, address) as cut, Registry(credentials=NoCredentials(), limits=FAST) as registry:
            ref = Reference.parse(f"{cut}/team/app:v1")
            assert await whole(registry, ref, pushed.layer, verify=True) == pushed.data[pushed.layer.digest]
            assert (line.connections, line.forwarded) == (11, pushed.layer.size)
            line.cuts, line.connections = [500_000, *[0] * 10], 0
            with pytest.raises(Unavailable, match=cut):
                await whole(registry, ref, pushed.layer)
            assert line.connections == 3
            line.cuts, line.connections = [1] * 1000, 0
            with pytest.raises(Unavailable):  # one byte for each connection is no progress
                await whole(registry, ref, pushed.layer)
            assert line.connections == 3
