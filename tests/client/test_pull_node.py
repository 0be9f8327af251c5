"""Pull and push through the command line, on a whole node: layers are unpacked here."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import images
import pytest
from aiohttp import web
from node import WHERRY, Node, eventually

from .image_house import Layout, digest_of, tar_of
from .registry_store import Store
from .registry_traps import serving

REF = "containerd.io/gc.ref.content"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    # What a killed client held is let go of after three seconds, not sixty.
    with Node(tmp_path_factory.mktemp("node"), WHERRY_CONTENT_IDLE="3") as made:
        yield made


@pytest.fixture(scope="module")
def registry() -> Iterator[images.Registry]:
    with images.Registry() as running:
        yield running


def labels(node: Node, digest: str, namespace: str) -> dict[str, str]:
    listed = node.json("content", "ls", "-n", namespace)
    found: dict[str, str] = next(blob["labels"] for blob in listed if blob["digest"] == digest)
    return found


def test_layers_that_are_discarded_leave_an_image_that_runs(node: Node, registry: images.Registry) -> None:
    image = images.layers()
    reference = registry.push(image, "discard/layers", "v1")
    node.run("pull", "-n", "discard", "--discard-unpacked-layers", "-q", reference)
    kept = labels(node, image.root["digest"], "discard")
    assert f"{REF}.config" in kept and not any(key.startswith(f"{REF}.l.") for key in kept)
    assert node.run("run", "-n", "discard", "--rm", reference).stdout.strip() == "19"
    # Again: the snapshots are there, so what went is not fetched, and the image is as it was.
    for layer in image.layers():
        node.run("content", "rm", "-n", "discard", layer["digest"], check=False)
    node.run("pull", "-n", "discard", "--discard-unpacked-layers", "-q", reference)
    here = {blob["digest"] for blob in node.json("content", "ls", "-n", "discard")}
    assert image.root["digest"] in here
    assert node.run("run", "-n", "discard", "--rm", reference).stdout.strip() == "19"


def test_a_pull_heals_a_layer_that_has_become_rotten(node: Node, registry: images.Registry) -> None:
    image = images.layers()
    reference = registry.push(image, "rot/layers", "v1")
    node.run("pull", "-n", "rot", "-q", "--no-unpack", reference)
    digest = image.layers()[3]["digest"]
    path = node.root / "content/blobs" / digest.replace(":", "/")
    data = path.read_bytes()
    path.write_bytes(data[:-20] + b"\xff" + data[-19:])
    refused = node.run("run", "-n", "rot", "--rm", reference, check=False)
    assert refused.returncode and digest in refused.stderr
    node.run("pull", "-n", "rot", "-q", reference)
    assert path.read_bytes() == data
    assert node.run("run", "-n", "rot", "--rm", reference).stdout.strip() == "19"


def test_pull_tag_and_push_by_hand(node: Node, registry: images.Registry, tmp_path: Path) -> None:
    image = images.platforms()
    reference = registry.push(image, "team/several", "v1")
    node.run("pull", "-n", "hand", "--all-platforms", "-q", reference)
    done = node.run("push", "-n", "hand", "-q", reference, f"{registry.address}/team/copy:v2")
    assert done.stdout.strip() == image.root["digest"]
    with registry.client() as reader:
        assert reader.manifest("team/copy", "v2")[1] == image.blob(image.root["digest"]).read_bytes()
    one = node.run("push", "-n", "hand", "--platform", "linux/arm64", reference, f"{registry.address}/team/copy:arm")
    arm = next(m for m in image.manifests() if m["platform"]["architecture"] == "arm64")
    assert one.stdout.split()[-1] == arm["digest"]
    assert "mounted" in one.stderr or "exists" in one.stderr


def test_an_incomplete_image_is_not_pushed(node: Node, registry: images.Registry) -> None:
    reference = registry.push(images.platforms(), "team/part", "v1")
    node.run("pull", "-n", "part", "--no-unpack", "-q", reference)
    done = node.run("push", "-n", "part", reference, f"{registry.address}/team/other:v1", check=False)
    assert done.returncode == 1 and "incomplete" in done.stderr and "for all platforms" in done.stderr


def test_a_mirror_serves_a_registry_that_is_nowhere(node: Node, registry: images.Registry, tmp_path: Path) -> None:
    registry.push(images.tiny(), "mirrored/tiny", "v1")
    folder = tmp_path / "nowhere.example"
    folder.mkdir()
    (folder / "hosts.toml").write_text(f'[host."http://{registry.address}"]\n')
    done = node.run("pull", "-n", "mirror", "--hosts-dir", str(tmp_path), "-q", "nowhere.example/mirrored/tiny:v1")
    assert done.stdout.strip() == images.tiny().root["digest"]
    kept = labels(node, images.tiny().root["digest"], "mirror")
    assert kept["containerd.io/distribution.source.nowhere.example"] == "mirrored/tiny"


def test_a_password_comes_from_stdin_or_the_environment(node: Node) -> None:
    image = images.tiny()
    with images.Registry(auth=("alice", "s3cret-word")) as locked:
        reference = locked.push(image, "team/tiny", "v1")
        arguments = ("pull", "-n", "auth", "--no-unpack", "-q", "--user", "alice")
        done = node.run(*arguments, "--password-stdin", reference, input="s3cret-word\n")
        assert done.stdout.strip() == image.root["digest"]
        secret = {**node.environment, "WHERRY_PASSWORD": "s3cret-word"}
        node.run("push", "-n", "auth", "--user", "alice", reference, f"{locked.address}/team/copy:v1", env=secret)
        done = node.run(*arguments, reference, env={**node.environment, "WHERRY_PASSWORD": "wr0ng"}, check=False)
        assert done.returncode == 1 and "unauthenticated" in done.stderr and "wr0ng" not in done.stderr
        done = node.run(*arguments, reference, check=False)
        assert done.returncode == 1 and "password" in done.stderr


def test_docker_s_own_files_are_read(node: Node, tmp_path: Path) -> None:
    image = images.tiny()
    with images.Registry(auth=("alice", "s3cret-word")) as locked:
        reference = locked.push(image, "team/tiny", "v1")
        helper = tmp_path / "docker-credential-test"
        helper.write_text('#!/bin/sh\ncat >/dev/null\necho \'{"Username": "alice", "Secret": "s3cret-word"}\'\n')
        helper.chmod(0o755)
        (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {locked.address: "test"}}))
        path = f"{tmp_path}:{os.environ['PATH']}"
        known = {**node.environment, "DOCKER_CONFIG": str(tmp_path), "PATH": path}
        node.run("pull", "-n", "docker", "--no-unpack", "-q", reference, env=known)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_an_interrupted_pull_is_taken_up_after_a_collection(node: Node, number: signal.Signals) -> None:
    """Its lease stays, so what it has fetched is there for the next one, which fetches the rest alone."""
    ns, layout, store = ["-n", f"broken-off-{number}"], Layout(), Store()
    layer = tar_of({"big": os.urandom(40 << 20)})
    store.put(layout, layout.image([layer], images.architecture()))
    part, ranges, stalled = int(len(layer) * 0.6), list[str | None](), asyncio.Event()

    async def stall(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        if what != "GET blobs" or not request.path.endswith(digest_of(layer)):
            return None
        ranges.append(request.headers.get("Range"))
        if len(ranges) > 1:
            return None
        response = web.StreamResponse(headers={"Content-Length": str(len(layer))})
        await response.prepare(request)
        await response.write(layer[:part])
        await stalled.wait()
        return response

    store.hook = stall
    async with serving(store.handle) as trap:
        reference = f"{trap.address}/team/app:v1"
        client = subprocess.Popen([WHERRY, "pull", *ns, "-q", reference], env=node.environment)

        def come() -> int:
            return sum(int(ingest["offset"]) for ingest in node.json("content", "ingests", *ns))

        await asyncio.to_thread(eventually, lambda: come() > part // 2, "it does not come", 60)
        client.send_signal(number)
        assert await asyncio.to_thread(client.wait, 60) in (130, -number)
        stalled.set()
        kept = await asyncio.to_thread(come)
        assert part // 2 < kept <= part
        assert [lease["labels"]["wherry/pull"] for lease in node.json("lease", "ls", *ns)] == [reference]
        await asyncio.to_thread(node.run, "gc")
        await asyncio.to_thread(node.run, "pull", *ns, "-q", reference)
    assert ranges == [None, f"bytes={kept}-{len(layer) - 1}"]
    assert node.json("lease", "ls", *ns) == [], "its own went with its end, and the other one's with the image's coming"
