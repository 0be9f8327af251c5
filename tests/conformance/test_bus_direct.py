"""The direct path beside the bus: who is let in, what becomes of a call when it ends, and what cannot hurt it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from counting import Counting
from housebus import NODE, PATIENCE, HouseBus, HouseServer
from test_bus_outage import Process
from toys import Toy, Toys, subject
from wherry_shared import context
from wherry_shared.bus import Bus, connect, credentials, direct, pipe, proxy, shortcut, sockets
from wherry_shared.bus.protocol import encode_headers
from wherry_shared.contract import pack
from wherry_shared.errors import DeadlineExceeded, Unavailable

NOBODY = 65534


@pytest.fixture
async def bus(house_server: HouseServer, tmp_path: Path) -> AsyncIterator[HouseBus]:
    made = await house_server.bus(tmp_path)
    yield made
    await made.close()
    await house_server.clean()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sockets.folder(tmp_path, "image", NODE, "image")


class Wire:
    """A connection made by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, folder: Path) -> Wire:
        (instance,) = sockets.instances(folder)
        return cls(*await asyncio.open_unix_connection(sock=sockets.connect(folder / f"{instance}.sock")))

    def ask(self, subject: str, reply: str, body: bytes = b"", **headers: str) -> None:
        block = encode_headers(headers)
        sizes = f"{len(block)} {len(block) + len(body)}"
        self.writer.write(f"HMSG {subject} 1 {reply} {sizes}\r\n".encode() + block + body + b"\r\n")

    async def rest(self) -> bytes:
        """Everything that comes until the other end closes."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def answer(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            line = await self.reader.readline()
            body = await self.reader.readexactly(int(line.split()[-1]) + 2)
            return line + body

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def wire(folder: Path) -> AsyncIterator[Wire]:
    made = await Wire.open(folder)
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is sent again because the machine stood still."""
    monkeypatch.setattr(proxy, "FIRST_ATTEMPT", PATIENCE)


@pytest.fixture
async def toy(bus: HouseBus) -> Toy:
    made = Toy()
    await bus.serve(made)
    return made


@pytest.fixture
def toys(bus: HouseBus) -> Toys:
    return bus.proxy(Toys, namespace="default")


def inbox(server: HouseServer, user: str) -> str:
    return credentials.find(server.creds, user).inbox_prefix + ".here"


# ---- it is the same request, and nats-server does not see it


async def test_neither_request_nor_answer_is_on_the_bus(bus: HouseBus, toy: Toy, toys: Toys) -> None:
    operator = await bus.server.operator()
    seen: list[str] = []
    await operator.subscribe(">", lambda message: seen.append(message.subject))
    with context.use(lease="l"):
        assert (await toys.tell("a"))["lease"] == "l"
    assert (await toys.add("x"), await toys.now("n")) == (1, "default n")
    await operator.flush()
    await operator.close()
    assert [s for s in seen if not s.startswith("$")] == []
    assert toy.contexts[0].identity.role == "admin"


async def test_the_answer_comes_back_on_the_connection_that_asked(bus: HouseBus, toy: Toy, folder: Path) -> None:
    reply = inbox(bus.server, "admin")
    heard: list[bytes] = []
    await bus.transport.subscribe(reply, lambda message: heard.append(message.data))
    async with wire(folder) as asking, wire(folder) as other:
        asking.ask(subject(bus, "now"), reply, pack({"name": "a"}))
        assert await asking.answer() == f"MSG {reply} 1 10\r\n".encode() + pack("default a") + b"\r\n"
        await bus.transport.flush()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(other.reader.read(1), 0.05)
    assert heard == []


async def test_a_new_replica_is_noticed(bus: HouseBus, toy: Toy, toys: Toys, folder: Path) -> None:
    await toys.tell()
    second = Toy()
    await bus.serve(second)
    assert len(sockets.instances(folder)) == 2
    (lanes,) = bus.transport._admin._services.values()  # type: ignore[attr-defined]
    lanes._look_at = 0.0  # the time has passed
    await asyncio.gather(*(toys.tell() for _ in range(64)))
    assert toy.seen["tell"] > 1 and second.seen["tell"] > 1


async def test_a_state_directory_with_a_long_name(house_server: HouseServer, tmp_path: Path) -> None:
    state = tmp_path / ("long" * 40)
    state.mkdir()
    made = await house_server.bus(state)
    toy = Toy()
    await made.serve(toy)
    assert len(sockets.instances(sockets.folder(state, "image", NODE, "image"))) == 1
    assert (await made.proxy(Toys, namespace="default").tell("a"))["word"] == "a"
    (lanes,) = made.transport._admin._services.values()  # type: ignore[attr-defined]
    assert [lane.answers for lane in lanes._lanes.values()] == [1]
    await made.close()


@pytest.mark.parametrize("off", ["environment", "argument"])
async def test_it_can_be_turned_off(
    house_server: HouseServer, tmp_path: Path, off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if off == "environment":
        monkeypatch.setenv("WHERRY_DIRECT", "0")
    own = credentials.find(house_server.creds, "image")
    made = await connect(
        [house_server.nats.url], node=NODE, name="image", seed=own.seed, inbox_prefix=own.inbox_prefix,
        direct=tmp_path if off == "environment" else None,
    )  # fmt: skip
    await made.serve(Toy())
    assert not isinstance(made.transport, shortcut.Shortcut)
    assert os.listdir(tmp_path) == []
    await made.close()


async def test_where_there_can_be_no_socket_the_bus_remains(house_server: HouseServer, tmp_path: Path) -> None:
    (tmp_path / "image").write_text("no folder")
    made = await house_server.bus(tmp_path)
    await made.serve(Toy())
    assert (await made.proxy(Toys, namespace="default").tell("a"))["word"] == "a"
    await made.close()


async def test_who_waits_awake_goes_to_sleep_over_what_takes_long(
    house_server: HouseServer, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    made = await house_server.connect(direct=tmp_path)
    admin = Bus(shortcut.Shortcut(made.transport, tmp_path, awake=True), node=NODE)
    toys = admin.proxy(Toys, namespace="default")
    await toys.tell()
    (lanes,) = admin.transport._services.values()  # type: ignore[attr-defined]
    (lane,) = lanes._lanes.values()
    lane._sleeps = 0
    call = asyncio.create_task(toys.pass_gate("a"))
    await toy.until("began")
    async with asyncio.timeout(PATIENCE):
        while not lane._sleeps:
            await asyncio.sleep(0.001)
    toy.gate("a").set()
    assert await call == "a"
    for _ in range(shortcut.SLEEPS_AFTER):
        assert lane._sleeps > 0
        await toys.tell()
    assert lane._sleeps == 0
    await admin.close()


# ---- who is let in


@pytest.mark.parametrize("user", ["tenant-default", "observer", "image", "task"])
async def test_others_are_sent_to_the_bus(bus: HouseBus, toy: Toy, folder: Path, user: str) -> None:
    """Nobody but the admin, and the services that call this one; a tenant may ask on the bus, and only there."""
    reply = inbox(bus.server, user)
    async with wire(folder) as made:
        made.ask(subject(bus, "tell"), reply)
        assert await made.rest() == f"HMSG {reply} 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n".encode()
    assert not toy.seen


async def test_a_service_is_let_in_where_it_calls(bus: HouseBus, toy: Toy, folder: Path) -> None:
    async with wire(folder) as made:
        made.ask(subject(bus, "tell"), inbox(bus.server, "namespace"))
        await made.answer()
    assert [c.identity.name for c in toy.contexts] == ["namespace"]


@pytest.mark.parametrize(
    "reply", ["_INBOX_" + "0" * 32 + ".here", "", "_INBOX_", "wherry.ev.v1.n1.default.images.create"]
)
async def test_who_shows_no_known_inbox_is_shut_out(bus: HouseBus, toy: Toy, folder: Path, reply: str) -> None:
    async with wire(folder) as made:
        made.ask(subject(bus, "tell"), reply or "x")
        assert await made.rest() == b""
    assert not toy.seen


async def test_the_identity_is_that_of_each_request(bus: HouseBus, toy: Toy, folder: Path) -> None:
    """A connection that the admin was served on serves nobody else."""
    async with wire(folder) as made:
        made.ask(subject(bus, "tell"), inbox(bus.server, "admin"))
        await made.answer()
        made.ask(subject(bus, "tell"), inbox(bus.server, "tenant-default"))
        assert b" 503" in await made.rest()
    assert toy.seen["tell"] == 1


@pytest.mark.parametrize(
    "strange",
    [
        "wherry.rpc.v1.n1.default.content.info", "wherry.rpc.v1.n2.default.image.tell", "x", "$SRV.PING",
        "wherry.ev.v1.n1.default.image.tell", "wherry.rpc.v1.n1.default.image.tell.other", "wherry.rpc.v1.n1.d.image",
    ],
)  # fmt: skip
async def test_only_this_processs_own_subjects_are_served(bus: HouseBus, toy: Toy, folder: Path, strange: str) -> None:
    async with wire(folder) as made:
        made.ask(strange, inbox(bus.server, "admin"))
        assert b" 503" in await made.rest()
    assert not toy.seen


# By its folder: the whole path may be longer than an address.
TRY = """
import os, socket, sys
os.chdir(sys.argv[1])
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[2])
sys.exit(len(s.recv(1)))
"""


async def test_another_user_does_not_get_in(bus: HouseBus, toy: Toy, folder: Path, tmp_path: Path) -> None:
    (instance,) = sockets.instances(folder)
    door = folder / f"{instance}.sock"
    assert (door.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)

    async def other() -> tuple[int | None, bytes]:
        process = await asyncio.create_subprocess_exec(
            "/usr/bin/python3", "-c", TRY, str(folder), door.name, user=NOBODY, stderr=subprocess.PIPE, cwd="/"
        )
        _, said = await process.communicate()
        return process.returncode, said

    status, said = await other()
    assert status == 1 and b"PermissionError" in said
    for path in (door, folder, *folder.parents):
        if path == Path("/tmp"):
            break
        path.chmod(0o777)
    assert await other() == (0, b"")  # an end, and no byte
    # Nor is a socket trusted that others could have put there.
    before = toy.seen["tell"]
    assert (await bus.proxy(Toys, namespace="default").tell("a"))["word"] == "a"
    (lanes,) = bus.transport._admin._services.values()  # type: ignore[attr-defined]
    assert (toy.seen["tell"], lanes._lanes) == (before + 1, {})


# ---- when it ends


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HouseServer]:
    with HouseServer(tmp_path / "bus", jetstream=False) as made:
        yield made


@pytest.fixture
async def service(server: HouseServer, tmp_path: Path) -> AsyncIterator[Process]:
    made = Process(server, tmp_path / "calls.db", tmp_path)
    await made.start()
    yield made
    await made.kill()


@pytest.fixture
async def counting(server: HouseServer, tmp_path: Path) -> AsyncIterator[Counting]:
    made = await server.connect(direct=tmp_path)
    yield made.proxy(Counting, namespace="default")
    await made.close()


async def test_a_process_that_is_killed_under_a_call(
    service: Process, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is noticed at once: nobody waits for a repetition. Its socket stays behind, until the next one starts."""
    monkeypatch.setattr(proxy, "FIRST_ATTEMPT", 60.0)
    with context.use(timeout=30):
        call = asyncio.create_task(counting.count("a", hold=0.5))
        await service.says("began")
        await service.kill()
        await service.start()
        assert await call == 1
        assert await counting.calls("a") == 1


async def test_what_took_effect_before_the_end_has_one_effect(service: Process, counting: Counting) -> None:
    with context.use(key="k"):
        assert await counting.count("a") == 1
        await service.kill()
        await service.start()
        assert await counting.count("a") == 1
    assert await counting.calls("a") == 1


async def test_a_socket_that_was_left_behind(service: Process, counting: Counting, folder: Path) -> None:
    await counting.calls("a")
    await service.kill()
    (left,) = sockets.instances(folder)
    with context.use(timeout=0.3), pytest.raises((Unavailable, DeadlineExceeded)):
        await counting.calls("a")
    await service.start()
    (now,) = sockets.instances(folder)
    assert now != left
    assert await counting.calls("a") == 0


async def test_a_process_that_hangs_is_left_alone(
    server: HouseServer, service: Process, counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "FIRST_ATTEMPT", 0.1)
    second = Process(server, tmp_path / "calls.db", tmp_path)
    await second.start()
    service.process.send_signal(signal.SIGSTOP)
    try:
        with context.use(timeout=60):
            assert [await counting.calls("a") for _ in range(8)] == [0] * 8
    finally:
        service.process.send_signal(signal.SIGCONT)
        await second.kill()


async def test_services_are_swapped_under_load_and_no_call_fails(bus: HouseBus, toys: Toys, folder: Path) -> None:
    members, done, stop = [Toy()], 0, False
    old = await bus.serve(members[0])

    async def call() -> None:
        nonlocal done
        while not stop:
            await toys.add("x")
            await toys.tell()
            done += 1

    callers = [asyncio.create_task(call()) for _ in range(16)]
    await members[0].until("add")
    for _ in range(6):
        await asyncio.sleep(0.05)
        members.append(member := Toy())
        new = await bus.serve(member)
        await old.drain()
        assert sockets.instances(folder) == [new.token]
        old = new
    await members[-1].until("add")
    stop = True
    await asyncio.gather(*callers)
    assert [sum(m.seen[what] for m in members) for what in ("add", "tell")] == [done, done]  # each once


async def test_while_nats_server_is_away_the_direct_path_goes_on(
    server: HouseServer, service: Process, counting: Counting
) -> None:
    """What can take it is done at once or not at all; what cannot fails at once, and is not done later."""
    assert await counting.count("a") == 1
    await service.says("began")
    server.nats.kill()
    assert await counting.count("a") == 2
    await service.says("began")
    under_way = asyncio.create_task(counting.count("b", hold=30))
    await service.says("began")
    await service.kill()
    with pytest.raises(Unavailable):
        await under_way
    with context.use(timeout=5), pytest.raises(Unavailable):
        await counting.count("c")
    server.nats.start()
    await service.start()
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                assert await counting.calls("a") == 2
                break
            except (Unavailable, DeadlineExceeded):
                await asyncio.sleep(0.02)
    assert (await counting.calls("b"), await counting.calls("c")) == (0, 0)


# ---- what cannot hurt it


async def test_a_caller_that_does_not_read(
    bus: HouseBus, toy: Toy, toys: Toys, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read from any more; and what it had asked by then does not fill the memory."""
    monkeypatch.setattr(pipe, "HIGH_WATER", 1 << 20)
    monkeypatch.setattr(pipe, "UNSENT_MAX", 4 << 20)
    async with wire(folder) as idle:
        for _ in range(3000):
            idle.ask(subject(bus, "fill"), inbox(bus.server, "admin"), pack({"size": 1_000_000}))
        assert (await toys.tell("a"))["word"] == "a"
        (door,) = [s.entrance for s in (await bus.of("image"))._servers]
        assert isinstance(door, direct.Door)
        async with asyncio.timeout(PATIENCE):
            while len(door._guests) > 1:  # it is dropped
                await asyncio.sleep(0.01)
        assert (await toys.tell("b"))["word"] == "b"


async def test_answers_that_the_socket_does_not_take_at_once(bus: HouseBus, toy: Toy, toys: Toys) -> None:
    found = await asyncio.gather(*(toys.fill(900_000 + n) for n in range(20)))
    assert [len(f) for f in found] == [900_000 + n for n in range(20)]


GARBAGE = [
    random.Random(7).randbytes(100_000) + b"\r\n", b"\r\n" * 1000, b"GET / HTTP/1.1\r\n\r\n", b"x" * 300_000,
    b"MSG a 1 x 99999999999\r\n", b"MSG a 1 x -1\r\n", b"MSG a 1 2000000\r\n", b"MSG\r\n", b"HMSG a 1 x 5 1\r\n",
    b"HMSG a 1 b c d e f 1 1\r\n", b"PUB a 1\r\nx\r\n",
]  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage_ends_its_own_connection_only(
    bus: HouseBus, toy: Toy, toys: Toys, folder: Path, garbage: bytes
) -> None:
    call = asyncio.create_task(toys.pass_gate("a"))
    await toy.until("began")
    async with wire(folder) as made:
        made.writer.write(garbage)
        assert await made.rest() == b""
    toy.gate("a").set()
    assert await call == "a"


async def test_a_thousand_connections(bus: HouseBus, toy: Toy, toys: Toys, folder: Path) -> None:
    await toys.tell()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    (door,) = [s.entrance for s in (await bus.of("image"))._servers]
    assert isinstance(door, direct.Door)
    many: list[socket.socket] = []
    try:
        (instance,) = sockets.instances(folder)
        while len(many) < 1000:
            with contextlib.suppress(BlockingIOError):  # so many wait to be let in
                many.append(sockets.connect(folder / f"{instance}.sock"))
            if len(many) % 100 == 0:
                assert (await toys.tell("a"))["word"] == "a"
            await asyncio.sleep(0)
        assert len(door._guests) <= direct.GUESTS_MAX
        late = await bus.server.connect(direct=folder.parents[2])
        assert (await late.proxy(Toys, namespace="default").tell("late"))["word"] == "late"  # by the bus
        await late.close()
    finally:
        for sock in many:
            sock.close()
    async with asyncio.timeout(PATIENCE):
        while len(door._guests) > 1:
            await asyncio.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
