"""Calls while a service or the bus is killed: what was promised arrives, and what was refused is never done later."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from counting import Counting
from housebus import PATIENCE, HouseServer
from wherry_shared import context
from wherry_shared.bus import Bus, credentials, discovery, proxy, subjects
from wherry_shared.bus.connection import Connection
from wherry_shared.bus.proxy import DEADLINE, ERROR_CODE
from wherry_shared.contract import pack
from wherry_shared.errors import DeadlineExceeded, InvalidArgument, Unavailable

SERVICE = Path(__file__).with_name("counting.py")


class Process:
    """The counting service in its own process."""

    def __init__(self, server: HouseServer, database: Path, *state: Path) -> None:
        """state: the node's state directory, for the direct path."""
        self._arguments = [
            sys.executable,
            str(SERVICE),
            server.nats.url,
            str(server.creds),
            str(database),
            *map(str, state),
        ]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        await self.says("ready")

    async def says(self, word: str) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            assert (await self.process.stdout.readline()).decode().strip() == word

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
            await self._process.wait()

    def resident(self) -> int:
        """The most memory that it has had, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HouseServer]:
    """A server of the test's own, to be killed."""
    with HouseServer(tmp_path / "bus", jetstream=False) as made:
        yield made


@pytest.fixture
async def service(server: HouseServer, tmp_path: Path) -> AsyncIterator[Process]:
    made = Process(server, tmp_path / "calls.db")
    await made.start()
    yield made
    await made.kill()


@pytest.fixture
async def bus(server: HouseServer) -> AsyncIterator[Bus]:
    made = await server.connect()
    yield made
    await made.close()


@pytest.fixture
def counting(bus: Bus) -> Counting:
    return bus.proxy(Counting, namespace="default")


async def test_a_service_that_dies_under_a_call_and_comes_back(
    service: Process, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "FIRST_ATTEMPT", 0.3)
    await counting.count("warm")
    await service.says("began")
    call = asyncio.create_task(counting.count("a", hold=0.2))
    await service.says("began")
    await service.kill()
    await service.start()
    assert await call == 1
    assert await counting.calls("a") == 1


async def test_an_answer_that_got_lost_is_given_again_by_the_next_process(
    service: Process, counting: Counting, bus: Bus
) -> None:
    with context.use(key="k"):
        assert await counting.count("a") == 1
        await service.kill()
        await service.start()
        assert await counting.count("a") == 1
    assert await counting.count("a") == 2


async def test_what_is_asked_while_the_bus_is_down_is_never_done(
    server: HouseServer, service: Process, bus: Bus, counting: Counting
) -> None:
    assert await counting.count("before") == 1
    await service.says("began")
    under_way = asyncio.create_task(counting.count("under way", hold=30))
    await service.says("began")
    server.nats.kill()
    with pytest.raises(Unavailable):
        await under_way
    refused = 0
    for _ in range(40):
        with context.use(timeout=0.5), pytest.raises((Unavailable, DeadlineExceeded)):
            await counting.count("zombie")
        refused += 1
        await asyncio.sleep(0.02)
    server.nats.start()
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                assert await counting.count("after") == 1
                break
            except Unavailable:
                await asyncio.sleep(0.02)
    await asyncio.sleep(0.6)  # longer than the refused calls' deadlines, were one kept somewhere
    assert (refused, await counting.calls("zombie"), await counting.calls("after")) == (40, 0, 1)


async def test_what_a_frozen_bus_holds_back_is_dropped_as_late(
    server: HouseServer, service: Process, counting: Counting
) -> None:
    """The server has the bytes and delivers them when it goes on: the deadline in them has passed."""
    assert await counting.count("before") == 1
    await service.says("began")
    server.nats.freeze()
    for _ in range(5):
        with context.use(timeout=0.1), pytest.raises((Unavailable, DeadlineExceeded)):
            await counting.count("zombie")
    server.nats.thaw()
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                assert await counting.calls("before") == 1
                break
            except (Unavailable, DeadlineExceeded):
                await asyncio.sleep(0.02)
    assert await counting.calls("zombie") == 0


async def test_hostile_bodies_do_not_fill_the_services_memory(service: Process, bus: Bus, counting: Counting) -> None:
    body = os.urandom(1 << 19)
    for _ in range(5):
        await counting.calls("a", body)  # the buffers that any large message needs
    before = service.resident()
    subject = f"{subjects.RPC}.n1.default.image.calls"
    attacks = [
        b"\x81\xa8anything" + b"\xdd" + (10**6).to_bytes(4, "big") + b"\x90" * 10**6,
        b"\x81\xa8anything" + b"\xdd" + (60_000).to_bytes(4, "big") + (b"\x92\x90\x80") * 60_000,
        b"\x81\xa8anything" + b"\x91" * 1_000_000,
        b"\x81\xa8anything\xdf" + (60_000).to_bytes(4, "big") + b"".join(
            b"\xa4%04x\x80" % n for n in range(60_000)
        ),
        b"\x81\xa8anything\xdd\xff\xff\xff\xff",
        pack({"name": "x" * 1_000_000}),
        os.urandom(1_000_000),
    ]  # fmt: skip
    for attack in attacks * 3:
        answer = await bus.transport.request(subject, attack, timeout=10)
        if attack[1:5] != b"\xa4nam":
            assert (answer.headers or {})[ERROR_CODE] == "3"
    flood = {f"X-{n}": "y" for n in range(60_000)}
    await bus.transport.request(subject, pack({"name": "a"}), headers=flood, timeout=10)
    assert await counting.calls("a") == 0
    assert service.resident() - before < 16 << 20


# ---- what other clients of NATS see


@pytest.fixture
async def stranger(server: HouseServer) -> AsyncIterator[Any]:
    """nats-py as it comes, as the admin."""
    own = credentials.find(server.creds, "admin")
    client = await nats.connect(
        server.nats.url, nkeys_seed_str=own.seed.decode(), inbox_prefix=own.inbox_prefix.encode()
    )
    yield client
    await client.close()


async def everybody(client: Any, subject: str) -> list[dict[str, Any]]:
    """Every answer to a request, from nats-py's own subscription: the first may take its time."""
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    await client.publish(subject, b"", reply=inbox)
    found: list[dict[str, Any]] = []
    try:
        while True:
            message = await subscription.next_msg(timeout=0.3 if found else PATIENCE)
            if (message.headers or {}).get("Status") == "503":  # the server's word that nobody listens
                return found
            found.append(json.loads(message.data))
    except nats.errors.TimeoutError:
        return found


async def test_discovery_by_the_micro_protocol(
    server: HouseServer, service: Process, counting: Counting, bus: Bus, stranger: Any
) -> None:
    await counting.calls("a")
    with pytest.raises(InvalidArgument):
        await bus.proxy(Counting, namespace="a b").calls("a")
    answer = await bus.transport.request(f"{subjects.RPC}.n1.default.image.calls", b"\xc1", timeout=5)
    assert (answer.headers or {})[ERROR_CODE] == "3"
    (ping,) = await everybody(stranger, "$SRV.PING")
    assert set(ping) == {"type", "name", "id", "version", "metadata"}
    assert (ping["type"], ping["name"], ping["version"]) == ("io.nats.micro.v1.ping_response", "image", "1.0.0")
    assert all(isinstance(v, str) for v in ping["metadata"].values())
    assert (ping["metadata"]["node"], ping["metadata"]["pid"]) == ("n1", str(service.process.pid))
    for form in ("$SRV.INFO", "$SRV.INFO.image", f"$SRV.INFO.image.{ping['id']}"):
        (info,) = await everybody(stranger, form)
        assert (info["type"], info["id"], info["description"]) == (
            "io.nats.micro.v1.info_response", ping["id"], "Counts.",
        )  # fmt: skip
        assert [e["name"] for e in info["endpoints"]] == ["count", "calls"]
        assert info["endpoints"][1]["subject"] == "wherry.rpc.v1.n1.*.image.calls"
        assert info["endpoints"][1]["queue_group"] == "image"
        assert json.loads(info["endpoints"][1]["metadata"]["schema"])["properties"]["name"] == {
            "title": "Name", "type": "string",
        }  # fmt: skip
    (stats,) = await everybody(stranger, "$SRV.STATS.image")
    assert stats["type"] == "io.nats.micro.v1.stats_response"
    assert stats["started"].endswith("+00:00")
    calls = stats["endpoints"][1]
    assert (calls["num_requests"], calls["num_errors"]) == (2, 1)
    assert calls["last_error"].startswith("3:image.calls: ")
    assert calls["processing_time"] > 0
    assert calls["average_processing_time"] == calls["processing_time"] // 2
    assert await everybody(stranger, "$SRV.PING.content") == []
    assert [a["id"] for a in await discovery.ask_all(bus.transport, "PING", wait=5, expect=1)] == [ping["id"]]


async def test_a_stranger_calls_with_what_nats_py_has(service: Process, counting: Counting, stranger: Any) -> None:
    subject = f"{subjects.RPC}.n1.default.image.count"
    answer = await stranger.request(subject, pack({"name": "a"}), timeout=5, headers={DEADLINE: "9999999999"})
    assert answer.data == pack(1)
    answer = await stranger.request(subject, pack({"nam": "a"}), timeout=5)
    assert answer.headers == {ERROR_CODE: "3", "Nats-Service-Error": "image.count: name: Field required"}


async def test_discovery_answers_go_to_inboxes_only(server: HouseServer, service: Process) -> None:
    """An answer to anywhere else would be a message that the asker may not publish himself: stdin, say."""
    watcher = await server.operator()
    seen: list[str] = []
    await watcher.subscribe("wherry.>", lambda message: seen.append(message.subject))
    observer = await server.connect(credentials.OBSERVER)
    assert isinstance(observer.transport, Connection)
    for target in ("wherry.io.v1.n1.default.c.e.stdin", "wherry.ev.v1.n1.default.images.create"):
        observer.transport.publish("$SRV.PING", b"", reply=target)
    assert len(await discovery.ask_all(observer.transport, "PING", wait=5, expect=1)) == 1
    await observer.transport.flush()
    await watcher.flush()
    assert seen == []
    await observer.close()
    await watcher.close()
