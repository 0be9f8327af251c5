"""The catalog services as the node runs them: processes of their own, each with its own rights on a real bus."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from natsd import NatsServer
from wherry_shared import context
from wherry_shared.api.container import Container, Containers, Runtime
from wherry_shared.api.image import Image, Images
from wherry_shared.api.lease import EXPIRE_LABEL, Leases, Resource
from wherry_shared.api.namespace import Namespaces
from wherry_shared.bus import Bus, connect, credentials
from wherry_shared.errors import NotFound, Unavailable
from wherry_shared.values import Descriptor

SERVICES = ("events", "namespace", "lease", "image", "container")
IMAGE = Image(name="redis", target=Descriptor(media_type="m", digest=f"sha256:{'a' * 64}", size=1))


class Node:
    """A nats-server with the node's users, and the services as child processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.creds = root / "creds"
        credentials.issue(self.creds, "n1")
        users = (self.creds / credentials.NATS_USERS).read_text()
        self.nats = NatsServer(root / "nats", config=users, jetstream=True)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, service: str) -> None:
        arguments = ["--node", "n1", "--root", self.root / "lib", "--state", self.root / "run", "--nats", self.nats.url]
        self.processes[service] = subprocess.Popen(
            [sys.executable, "-m", f"wherry_{service}", *map(str, arguments), "--creds", str(self.creds)]
        )

    def stop(self, service: str, number: signal.Signals = signal.SIGTERM) -> int:
        process = self.processes.pop(service)
        process.send_signal(number)
        return process.wait(60)

    async def connect(self) -> Bus:
        admin = credentials.find(self.creds, "admin")
        return await connect(
            [self.nats.url], node="n1", name="test", seed=admin.seed, inbox_prefix=admin.inbox_prefix
        )  # fmt: skip


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path)
    with node.nats:
        for service in SERVICES:
            node.start(service)
        yield node
        for service in list(node.processes):
            assert node.stop(service) == 0


async def test_they_work_with_their_own_rights_and_survive_a_kill(node: Node) -> None:
    bus = await node.connect()
    images, leases = bus.proxy(Images, namespace="default"), bus.proxy(Leases, namespace="default")
    containers, namespaces = bus.proxy(Containers, namespace="default"), bus.proxy(Namespaces)
    with context.use(timeout=30):
        assert (await namespaces.walk()).items == []
        await leases.create("pull", {EXPIRE_LABEL: "2100-01-01T00:00:00Z"})
        with context.use(lease="pull"):
            made = await images.create(IMAGE.model_copy(update={"labels": {EXPIRE_LABEL: "2100-01-01T00:00:00Z"}}))
        container = await containers.create(Container(id="redis", runtime=Runtime(name="runc")))
        assert (await leases.resources("pull")).items == [Resource(type="images", id="redis")]
        while not (known := (await namespaces.walk()).items):
            await asyncio.sleep(0.02)
        assert [n.name for n in known] == ["default"]
        for service in ("image", "container", "lease", "namespace"):
            node.stop(service, signal.SIGKILL)
            node.start(service)
        assert await images.get("redis") == made
        assert await containers.get("redis") == container
        assert (await leases.resources("pull")).items == [Resource(type="images", id="redis")]
        assert (await namespaces.walk()).items == known
        with pytest.raises(NotFound):
            await images.get("other")
        with pytest.raises(Unavailable, match=r"the (content|snapshot) service"):
            await namespaces.delete("default")
    await bus.close()


async def test_what_comes_into_being_while_a_process_is_away_makes_it_known(node: Node) -> None:
    bus = await node.connect()
    namespaces = bus.proxy(Namespaces)
    with context.use(timeout=30):
        assert (await namespaces.walk()).items == []
        node.stop("namespace", signal.SIGKILL)
        await bus.proxy(Images, namespace="missed").create(IMAGE)
        node.start("namespace")
        while not (known := (await namespaces.walk()).items):
            await asyncio.sleep(0.02)
        assert [n.name for n in known] == ["missed"]
        await bus.proxy(Leases, namespace="default").walk()  # all are there, and end in good order
        await bus.proxy(Containers, namespace="default").walk()
    await bus.close()
