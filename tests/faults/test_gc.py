"""Collections on a real node, with processes killed around them: what lives stays, and what is dead goes."""

from __future__ import annotations

import asyncio
import hashlib
import random
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import wherry
from housebus import PATIENCE
from images import Registry, redis
from node import Node, eventually
from wherry_shared import context
from wherry_shared.api.gc import Collected, Collections
from wherry_shared.api.lease import EXPIRE_LABEL
from wherry_shared.errors import DeadlineExceeded, NotFound, Unavailable, WherryError
from wherry_shared.values import now

KILLED = ("lease", "content", "snapshot", "image", "container")
# A kill that comes so long after the collection was asked for; it takes about 30 ms.
DELAYS = (0.0, 0.015, 0.04)


@pytest.fixture(scope="module")
def redis_ref(registry: Registry) -> str:
    return registry.push(redis(), "library/redis", "7")


async def collect(client: wherry.Client) -> Collected:
    """As soon as every service is there again."""
    while True:
        try:
            with context.use(timeout=4.0):
                return await client.bus.proxy(Collections).collect()
        except (Unavailable, DeadlineExceeded):
            await asyncio.sleep(0.1)


async def garbage(client: wherry.Client, count: int, prefix: str) -> None:
    lease = await client.leases.create()
    with context.use(lease=lease.id):
        for number in range(count):
            data = f"{prefix}-{number}".encode()
            await client.content.put(data, digest_of(data))
            await client.snapshots.prepare("overlay", f"{prefix}-{number}")
    await client.leases.delete(lease.id)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


async def runs(client: wherry.Client, image: wherry.Image, name: str) -> None:
    """The image is whole: a container of it runs."""
    container = await client.new_container(name, image, args=["redis-cli", "--version"])
    async with container.new_task() as task:
        await task.start()
        assert (await task.wait()).code == 0
    await container.delete(snapshot=True)


@pytest.mark.parametrize("service", KILLED)
async def test_a_kill_in_a_collection(node: Node, redis_ref: str, namespace: str, service: str) -> None:
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        image = await client.pull(redis_ref, unpack=True)
        blobs = {b.digest for b in (await client.content.walk()).items}
        for number, delay in enumerate(DELAYS):
            await garbage(client, 20, f"g{number}")
            task = asyncio.create_task(collect(client))
            await asyncio.sleep(delay)
            old = node.kill(service)
            await task
            node.wait_restarted(service, old)
        await collect(client)
        assert {b.digest for b in (await client.content.walk()).items} == blobs
        assert not [s for s in (await client.snapshots.walk("overlay")).items if s.name.startswith("g")]
        await runs(client, image, "check")
        await client.images.delete(image.name)
        await collect(client)
        assert (await client.content.walk()).items == []
        assert (await client.snapshots.walk("overlay")).items == []


async def test_pulls_and_collections_side_by_side(node: Node, redis_ref: str, busybox_ref: str, namespace: str) -> None:
    """Pull, run, delete and expiring leases against a collector that never rests (threats: 40)."""
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        done = asyncio.Event()

        async def collecting() -> int:
            count = 0
            while not done.is_set():
                await collect(client)
                count += 1
            return count

        collector = asyncio.create_task(collecting())
        chance = random.Random(7)
        for number in range(6):
            image = await client.pull(chance.choice((redis_ref, busybox_ref)), unpack=True)
            args = ["true"] if "busybox" in image.name else ["redis-cli", "-v"]
            container = await client.new_container(f"c{number}", image, args=args)
            async with container.new_task() as task:
                await task.start()
                assert (await task.wait()).code == 0
            if chance.random() < 0.5:
                await client.images.delete(image.name)  # its snapshots live on with the container
                await client.snapshots.mounts("overlay", f"c{number}")
            await container.delete(snapshot=True)
        done.set()
        assert await collector > 1
        for record in (await client.images.walk()).items:
            if "redis" in record.name:
                await runs(client, await client.image(record.name), "last")
            await client.images.delete(record.name)
        await client.bus.proxy(Collections).collect()
        assert (await client.content.walk()).items == []
        assert (await client.snapshots.walk("overlay")).items == []


async def test_garbage_goes_by_itself(node: Node, busybox_ref: str, namespace: str) -> None:
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        image = await client.pull(busybox_ref, unpack=True)
        await client.images.delete(image.name)
        async with asyncio.timeout(PATIENCE):
            while (await client.content.walk()).items or (await client.snapshots.walk("overlay")).items:
                await asyncio.sleep(0.05)


async def test_a_lease_that_expires_ends_by_itself(node: Node, namespace: str) -> None:
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        for seconds in (1, 5, 25):
            labels = {EXPIRE_LABEL: (now() + timedelta(seconds=seconds)).isoformat()}
            lease = await client.leases.create(labels=labels)
            with context.use(lease=lease.id), suppress(NotFound):  # then the machine took longer than that
                await client.content.put(b"x", digest_of(b"x"))
                break
        async with asyncio.timeout(PATIENCE):
            while (await client.content.walk()).items:
                await asyncio.sleep(0.1)
        with pytest.raises(NotFound):
            await client.leases.get(lease.id)


def test_the_command_line(node: Node, busybox_ref: str, namespace: str) -> None:
    own = ("--namespace", namespace)
    node.run("pull", *own, busybox_ref)
    (image,) = node.json("images", *own)
    lease = node.run("lease", "create", *own).stdout.strip()
    assert [row["id"] for row in node.json("lease", "ls", *own)] == [lease]
    node.run("lease", "add", *own, lease, "content", image["digest"])
    node.run("lease", "add", *own, lease, "images", "other")
    node.run("lease", "rm", *own, lease, "images", "other")
    assert node.json("lease", "resources", *own, lease) == [{"type": "content", "id": image["digest"]}]
    blobs = node.json("content", "ls", *own)
    asyncio.run(_forget(node, namespace, image["name"]))
    assert "kept" in node.run("gc").stdout
    assert [b["digest"] for b in node.json("content", "ls", *own)] == [b["digest"] for b in blobs]
    node.run("lease", "delete", *own, "--sync", lease)
    assert node.json("content", "ls", *own) == []
    assert node.json("gc", "--dry-run")["dead"] == []


async def _forget(node: Node, namespace: str, name: str) -> None:
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        await client.images.delete(name)


def test_a_node_that_is_killed_collects_after_its_start(tmp_path: Path, busybox_ref: str) -> None:
    with Node(tmp_path) as node:

        async def make() -> None:
            async with wherry.connect(state=str(node.state)) as client:
                await client.pull(busybox_ref, unpack=True)
                await garbage(client, 50, "g")

        asyncio.run(make())
        for service in KILLED:
            node.kill(service)
        eventually(lambda: _clean(node), "garbage stays", 60.0)
        assert node.run("run", "--rm", busybox_ref, "echo", "alive").stdout == "alive\n"


def _clean(node: Node) -> bool:
    try:
        return not [row for row in node.json("snapshot", "ls") if row["name"].startswith("g-")]
    except (AssertionError, WherryError):
        return False
