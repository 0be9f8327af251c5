"""Pushing to Debian's docker-registry: what arrives is what was sent, whatever the line does."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import images
import pytest
from wherry.client import Client
from wherry.registry import Credentials, Limits, upload
from wherry.registry.credentials import Given
from wherry_shared.errors import Unauthenticated

from .image_house import Layout, digest_of, house, small
from .test_push import Told, have, platforms

pytestmark = pytest.mark.skipif(shutil.which("docker-registry") is None, reason="docker-registry is not installed")

MIB = 1 << 20


@pytest.fixture(scope="module")
def registry() -> Iterator[images.Registry]:
    with images.Registry() as running:
        yield running


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with house(tmp_path / "house") as made:
        yield made


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "WHOLE_MAX", MIB)
    monkeypatch.setattr(upload, "PART", 2 * MIB)
    monkeypatch.setattr("wherry.registry.client.Limits", lambda: Limits(backoff=0.05))


def the_same(registry: images.Registry, layout: Layout, repository: str, tag: str, digest: str) -> None:
    """Everything of the image is there byte for byte."""
    with registry.client() as reader:
        assert digest_of(reader.manifest(repository, tag)[1]) == digest
        for name, data in layout.blobs.items():
            if data.startswith(b'{"schemaVersion"'):
                assert reader.manifest(repository, name)[1] == data
            else:
                assert reader.blob(repository, name) == data


async def test_an_index_arrives_whole(client: Client, registry: images.Registry) -> None:
    layout, index = platforms()
    await have(client, layout, index)
    told = Told()
    pushed = await client.push("team/app:v1", f"{registry.address}/real/index:v1", on_progress=told)
    assert pushed.digest == index["digest"]
    the_same(registry, layout, "real/index", "v1", index["digest"])
    again = Told()
    await client.push("team/app:v1", f"{registry.address}/real/index:v1", on_progress=again)
    assert {step for name, step in again.steps.items() if name.startswith("sha256:")} == {"exists"}


async def test_a_large_layer_arrives_in_parts_and_is_mounted_next_door(
    client: Client, registry: images.Registry
) -> None:
    layout = Layout()
    data = os.urandom(7 * MIB + 123)
    manifest = layout.image([data])
    await have(client, layout, manifest)
    await client.push("team/app:v1", f"{registry.address}/real/large:v1")
    the_same(registry, layout, "real/large", "v1", manifest["digest"])
    told = Told()
    await client.push("team/app:v1", f"{registry.address}/next/door:v1", on_progress=told)
    assert told.steps[digest_of(data)] == "mounted"
    the_same(registry, layout, "next/door", "v1", manifest["digest"])


async def test_a_pulled_image_is_pushed_to_another_registry(client: Client, registry: images.Registry) -> None:
    image = images.layers()
    reference = registry.push(image, "real/source", "v1")
    await client.pull(reference)
    with images.Registry() as other:
        pushed = await client.push(reference, f"{other.address}/copy/of:v1")
        assert pushed.digest == image.root["digest"]
        with other.client() as reader:
            for descriptor in image.blobs():
                assert reader.blob("copy/of", descriptor["digest"]) == image.blob(descriptor["digest"]).read_bytes()


async def test_a_registry_with_a_password(client: Client) -> None:
    layout, manifest = small()
    await have(client, layout, manifest)
    with images.Registry(auth=("alice", "s3cret-word")) as locked:
        target = f"{locked.address}/team/app:v1"
        given = Given(Credentials("alice", "s3cret-word"), locked.address)
        await client.push("team/app:v1", target, credentials=given)
        the_same(locked, layout, "team/app", "v1", manifest["digest"])
        with pytest.raises(Unauthenticated) as caught:
            wrong = Given(Credentials("alice", "other-word"), locked.address)
            await client.push("team/app:v1", target, credentials=wrong)
        assert "word" not in str(caught.value)


@asynccontextmanager
async def line(address: str, breaks_after: list[int]) -> AsyncIterator[tuple[str, list[int]]]:
    """A line to a registry whose connections that carry many bytes break, each after the next number of them; gives
    its address and how many bytes each connection carried towards the registry."""
    host, _, port = address.partition(":")
    carried: list[int] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int | None) -> None:
        try:
            while data := await reader.read(65536):
                if count is not None:
                    carried[count] += len(data)
                    if breaks_after and carried[count] > breaks_after[0]:
                        breaks_after.pop(0)
                        return
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        carried.append(0)
        number = len(carried) - 1
        await asyncio.gather(pump(reader, far_writer, number), pump(far_reader, writer, None))
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", carried


async def test_a_line_that_breaks_is_taken_up_again(client: Client, registry: images.Registry) -> None:
    layout = Layout()
    data = os.urandom(9 * MIB)
    manifest = layout.image([data])
    await have(client, layout, manifest)
    # This registry forgets an upload whose part broke off, so each break costs all that was sent of the blob.
    async with line(registry.address, [3 * MIB, 5 * MIB]) as (address, carried):
        await client.push("team/app:v1", f"{address}/real/broken:v1")
    the_same(registry, layout, "real/broken", "v1", manifest["digest"])
    assert sum(carried) < (9 + 3 + 5 + 1) * MIB
