"""deploy/nats/cluster.conf and leaf.conf: a node joins a cluster over TLS, and crosses only what is its own."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import deployed
import pytest
from deployed import WHERRY
from natsd import BINARY, free_port
from wherry_shared.api.image import Image, Images
from wherry_shared.bus import Bus, credentials, discovery, subjects
from wherry_shared.bus.connection import Connection
from wherry_shared.errors import InvalidArgument, PermissionDenied, Unauthenticated, Unavailable, WherryError
from wherry_shared.values import Descriptor

IMAGE = Image(name="redis", target=Descriptor(media_type="m", digest=f"sha256:{'a' * 64}", size=1))
SECONDS = 60.0


class Authority:
    """The fleet's certificates, by the openssl program."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self._openssl("req", "-x509", *self._new_key("ca"), "-out", "ca.pem", "-subj", "/CN=fleet", "-days", "2")
        self._openssl("req", *self._new_key("server"), "-out", "server.csr", "-subj", "/CN=server")
        (place / "names").write_text("subjectAltName=IP:127.0.0.1")
        self._openssl(
            "x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", "server.pem", "-days", "2", "-extfile", "names",
        )  # fmt: skip

    def _new_key(self, name: str) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key"]

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.place, check=True, capture_output=True)

    @property
    def settings(self) -> dict[str, str]:
        """The configurations' variables for TLS."""
        files = {"CERT": "server.pem", "KEY": "server.key", "CA": "ca.pem"}
        return {f"WHERRY_NATS_{name}": str(self.place / file) for name, file in files.items()}

    @property
    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.place / "ca.pem"))


@dataclass
class Fleet:
    """A cluster of two servers, and the nodes that join it. Leaves join the first; who asks is with the second."""

    place: Path
    tls: Authority
    ports: tuple[int, int]
    cluster_ports: tuple[int, int]
    leaf_ports: tuple[int, int]

    @property
    def hub(self) -> str:
        return f"tls://127.0.0.1:{self.ports[1]}"

    @property
    def hub_creds(self) -> Path:
        return self.place / "hub" / "creds"

    def hub_settings(self, number: int) -> dict[str, str]:
        routes = ", ".join(f'"tls://127.0.0.1:{port}"' for port in self.cluster_ports)
        return {
            **self.tls.settings, "WHERRY_NATS_NAME": f"hub-{number}", "WHERRY_NATS_HOST": "127.0.0.1",
            "WHERRY_NATS_PORT": str(self.ports[number]), "WHERRY_LEAF_PORT": str(self.leaf_ports[number]),
            "WHERRY_CLUSTER_PORT": str(self.cluster_ports[number]), "WHERRY_CLUSTER_ROUTES": f"[{routes}]",
            "WHERRY_NATS_STORE": str(self.place / "hub" / f"store-{number}"),
        }  # fmt: skip

    def leaf_settings(self, node: str, port: int) -> dict[str, str]:
        return {
            **self.tls.settings, "WHERRY_NODE": f"'{node}'", "WHERRY_NATS_NAME": f"'{node}'",
            "WHERRY_NATS_HOST": "127.0.0.1", "WHERRY_NATS_PORT": str(port),
            "WHERRY_LEAF_URLS": f'["tls://127.0.0.1:{self.leaf_ports[0]}"]',
            "WHERRY_LEAF_SEED": (self.hub_creds / f"leaf-{node}.nk").read_text().strip(),
            "WHERRY_NATS_STORE": str(self.place / node / "store"),
        }  # fmt: skip

    def install(self, name: str) -> Path:
        """A server's configuration folder, once its users are made."""
        return deployed.install_nats(self.place / name / "nats", self.place / name / "creds" / "nats")

    @asynccontextmanager
    async def at_hub(self, user: str = credentials.ADMIN) -> AsyncIterator[Bus]:
        own = credentials.find(self.hub_creds, user)
        transport = await Connection.connect(
            [self.hub], name=user, seed=own.seed, inbox_prefix=own.inbox_prefix,
            tls=self.tls.client,
        )  # fmt: skip
        bus = Bus(transport, node="n1")
        try:
            yield bus
        finally:
            await bus.close()


def _issue(creds: Path, node: str, *arguments: str) -> None:
    command = [WHERRY, "auth", "init", str(creds), "--node", node, "--user", f"{os.getuid()}:{os.getgid()}", *arguments]
    subprocess.run(command, env=deployed.outside(), check=True, capture_output=True)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    place = tmp_path_factory.mktemp("fleet")
    ports = [(free_port(), free_port()) for _ in range(3)]
    made = Fleet(place, Authority(place / "tls"), *ports)
    _issue(made.hub_creds, "hub", "--leaf", "n1", "--leaf", "n2", "--tenant", "team")
    config = made.install("hub") / "cluster.conf"
    with ExitStack() as stack:
        for number in (0, 1):
            port, log = made.ports[number], place / f"hub-{number}.log"
            stack.enter_context(deployed.nats(config, made.hub_settings(number), port, log))
        yield made


@pytest.fixture(scope="module")
def node(fleet: Fleet) -> Iterator[int]:
    """Node n1 with its bus and two services, whose callers the hub's admin and tenant are; answers its port."""
    creds = fleet.place / "n1" / "creds"
    creds.mkdir(parents=True)
    for user in ("admin", "tenant-team"):  # the same seeds, and so the same identities, on every node
        (creds / f"{user}.nk").write_bytes((fleet.hub_creds / f"{user}.nk").read_bytes())
        (creds / f"{user}.nk").chmod(0o600)
    _issue(creds, "n1", "--tenant", "team")
    port = free_port()
    config = fleet.install("n1") / "leaf.conf"
    with ExitStack() as stack:
        stack.enter_context(deployed.nats(config, fleet.leaf_settings("n1", port), port, fleet.place / "n1.log"))
        for name in ("events", "image"):
            settings = {
                "WHERRY_NODE": "n1", "WHERRY_NATS": f"nats://127.0.0.1:{port}", "WHERRY_CREDS": str(creds / name),
                "WHERRY_ROOT": str(fleet.place / "n1" / "root"), "WHERRY_STATE": str(fleet.place / "n1" / "state"),
            }  # fmt: skip
            command = [sys.executable, "-m", f"wherry_{name}"]
            stack.enter_context(deployed.running(command, settings, log=fleet.place / f"{name}.log"))
        yield port


@contextmanager
def stolen(fleet: Fleet) -> Iterator[int]:
    """Node n2, taken over: its seed and its certificate, and a server that lets everybody do everything."""
    port = free_port()
    config = fleet.place / "n2.conf"
    own = fleet.leaf_settings("n2", port)
    config.write_text(
        f"""
        listen: "127.0.0.1:{port}"
        leafnodes {{ remotes = [{{
          urls: {own["WHERRY_LEAF_URLS"]}, nkey: "{own["WHERRY_LEAF_SEED"]}"
          tls {{ cert_file: "{own["WHERRY_NATS_CERT"]}", key_file: "{own["WHERRY_NATS_KEY"]}"
                ca_file: "{own["WHERRY_NATS_CA"]}" }}
        }}] }}
        """
    )
    with deployed.nats(config, {}, port, fleet.place / "n2.log"):
        yield port


async def _until_answered(bus: Bus, names: set[str]) -> None:
    async with asyncio.timeout(SECONDS):
        while True:
            answers = await discovery.ask_all(bus.transport, "PING", wait=0.5, expect=len(names))
            if {a["name"] for a in answers} == names:
                return


async def _next(received: asyncio.Queue[str], wanted: str) -> list[str]:
    """What came before `wanted`, which has to come."""
    before = []
    async with asyncio.timeout(SECONDS):
        while (subject := await received.get()) != wanted:
            before.append(subject)
    return before


async def test_the_hub_drives_a_node_and_hears_what_happens_there(fleet: Fleet, node: int) -> None:
    async with fleet.at_hub() as bus:
        await _until_answered(bus, {"events", "image"})
        events: asyncio.Queue[str] = asyncio.Queue()
        await bus.transport.subscribe(f"{subjects.EV}.>", lambda m: events.put_nowait(m.subject))
        await bus.transport.flush()
        assert (await bus.proxy(Images, namespace="default").create(IMAGE)).name == "redis"
        await _next(events, f"{subjects.EV}.n1.default.images.create")


async def test_the_command_line_reaches_a_node_by_way_of_the_hub(fleet: Fleet, node: int) -> None:
    async with fleet.at_hub() as bus:
        await _until_answered(bus, {"events", "image"})
        await bus.proxy(Images, namespace="cli").create(IMAGE)
    settings = {
        "SSL_CERT_FILE": str(fleet.tls.place / "ca.pem"), "WHERRY_NATS": fleet.hub, "WHERRY_NODE": "n1",
        "WHERRY_CREDS": str(fleet.hub_creds / "admin.nk"),
    }  # fmt: skip
    said = await asyncio.to_thread(
        subprocess.run, [WHERRY, "images", "-n", "cli"], env={**deployed.outside(), **settings}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert said.returncode == 0 and "redis" in said.stdout, said.stderr


async def test_a_tenant_has_its_namespace_on_the_node_and_no_other(fleet: Fleet, node: int) -> None:
    async with fleet.at_hub("tenant-team") as bus:
        assert (await bus.proxy(Images, namespace="team").create(IMAGE)).name == "redis"
        with pytest.raises(WherryError) as refused:
            await asyncio.wait_for(bus.proxy(Images, namespace="default").get("redis"), SECONDS)
        assert isinstance(refused.value, PermissionDenied | Unavailable)


async def test_a_stolen_node_speaks_for_itself_alone(fleet: Fleet, node: int) -> None:
    """Forged events and requests of another node stay where they were made; its own go through."""
    heard: asyncio.Queue[str] = asyncio.Queue()
    forged = {
        f"{subjects.EV}.n1.default.tasks.exit", f"{subjects.IO}.n1.default.c.e.stdout",
        f"{subjects.RPC}.n1.default.image.delete",
    }  # fmt: skip
    own, real = f"{subjects.EV}.n2.default.tasks.exit", f"{subjects.EV}.n1.default.images.create"
    with stolen(fleet) as port:
        thief = await Connection.connect([f"nats://127.0.0.1:{port}"], name="thief", inbox_prefix="_INBOX_thief")
        overheard: set[str] = set()
        for root in (subjects.EV, subjects.IO, subjects.RPC):
            await thief.subscribe(f"{root}.n1.>", lambda m: overheard.add(m.subject))
        await thief.flush()
        async with fleet.at_hub() as bus:
            for root in (subjects.EV, subjects.IO):
                await bus.transport.subscribe(f"{root}.>", lambda m: heard.put_nowait(m.subject))
            await bus.transport.flush()
            await _until_answered(bus, {"events", "image"})
            async with asyncio.timeout(SECONDS):
                while heard.empty():  # the leaf may join only now
                    for subject in (*sorted(forged), own):
                        thief.publish(subject, b"forged")
                    await thief.flush()
                    await asyncio.sleep(0.05)
            await bus.proxy(Images, namespace="default").create(IMAGE.model_copy(update={"name": "second"}))
            assert set(await _next(heard, real)) == {own}
            await thief.flush()
        assert overheard <= forged  # what it said itself, and nothing of n1's
        await thief.close()


async def test_a_nodes_requests_do_not_leave_it(fleet: Fleet, node: int) -> None:
    """Nobody in the cluster can stand in for a service that is away, even one with the right to listen."""
    creds = fleet.place / "n1" / "creds"
    own = credentials.find(creds, "admin")
    local = Bus(
        await Connection.connect(
            [f"nats://127.0.0.1:{node}"], name="local", seed=own.seed, inbox_prefix=own.inbox_prefix
        ),
        node="hub",
    )
    service = credentials.find(fleet.hub_creds, "image")
    stand_in = await Connection.connect(
        [fleet.hub], name="image", seed=service.seed, inbox_prefix=service.inbox_prefix,
        tls=fleet.tls.client,
    )  # fmt: skip
    caught: list[str] = []
    await stand_in.subscribe(f"{subjects.RPC}.hub.*.image.>", lambda m: caught.append(m.subject))
    await stand_in.flush()
    try:
        async with fleet.at_hub() as bus:
            await _until_answered(bus, {"events", "image"})
            for _ in range(3):
                local.transport.publish(f"{subjects.RPC}.hub.default.image.get", b"secret")
            await local.transport.flush()
            await bus.proxy(Images, namespace="default").walk()  # what the same link delivers comes after them
        assert caught == []
    finally:
        await stand_in.close()
        await local.close()


async def test_a_leafs_seed_opens_no_client_connection_and_none_is_anonymous(fleet: Fleet) -> None:
    leaf = credentials.find(fleet.hub_creds, "leaf-n1")
    for seed, tls in ((leaf.seed, fleet.tls.client), (None, fleet.tls.client)):
        with pytest.raises((Unauthenticated, Unavailable)):
            await Connection.connect(
                [fleet.hub], name="x", seed=seed, inbox_prefix=leaf.inbox_prefix, tls=tls,
                connect_timeout=2.0,
            )  # fmt: skip
    with pytest.raises((Unavailable, InvalidArgument)):  # its certificate is of no authority that is known here
        await Connection.connect(
            [fleet.hub], name="x", seed=leaf.seed, inbox_prefix=leaf.inbox_prefix,
            tls=ssl.create_default_context(), connect_timeout=2.0,
        )  # fmt: skip


def test_nats_server_accepts_both_configurations(fleet: Fleet, tmp_path: Path) -> None:
    hub = fleet.place / "hub" / "nats" / "cluster.conf"
    settings = {**fleet.hub_settings(0), "WHERRY_CLUSTER_ROUTES": '["tls://hub-2:6222", "tls://hub-3:6222"]'}
    users = fleet.place / "hub" / "creds" / "nats"
    leaf = deployed.install_nats(tmp_path / "nats", users) / "leaf.conf"
    for config, environment in ((hub, settings), (leaf, fleet.leaf_settings("n1", 4222))):
        said = subprocess.run(
            [BINARY, "-t", "--config", config], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert said.returncode == 0 and "is valid" in said.stderr + said.stdout, said.stderr
