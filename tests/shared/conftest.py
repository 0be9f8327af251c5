"""Fixtures of the tests of wherry_shared: real nats-servers, and both event loops for what stands on sockets."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

sys.path.append(str(Path(__file__).parent.parent))  # for natsd.py

from housebus import HouseServer
from natsd import NatsServer
from wherry_shared.bus import Bus, credentials
from wherry_shared.bus.connection import Connection
from wherry_shared.bus.transport import EventLog

Connect = Callable[..., Awaitable[Connection]]


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    if item.path.name.startswith("test_connection"):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One nats-server with JetStream for the tests of a module that leave it alone."""
    with NatsServer(tmp_path_factory.mktemp("nats"), jetstream=True) as server:
        yield server


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A nats-server of the test's own, to be stopped, killed and frozen."""
    with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Make connections, `connect(server, **options)`, that are closed with the test."""
    made: list[Connection] = []

    async def connect(server: NatsServer, **options: Any) -> Connection:
        options = {"name": "test", "inbox_prefix": "_INBOX.test", **options}
        made.append(await Connection.connect([server.url], **options))
        return made[-1]

    yield connect
    for connection in made:
        await connection.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HouseServer]:
    """The same with a node's users and their permissions."""
    with HouseServer(tmp_path / "bus") as made:
        yield made


@pytest.fixture
async def places(server: HouseServer) -> AsyncIterator[Callable[[str], Awaitable[Bus]]]:
    """Make connections of users, `places("image")`, that are closed with the test."""
    made: list[Bus] = []

    async def place(user: str) -> Bus:
        made.append(await server.connect(user))
        return made[-1]

    yield place
    for bus in made:
        await bus.transport.close()


@pytest.fixture
async def image(places: Callable[[str], Awaitable[Bus]]) -> Bus:
    return await places("image")


@pytest.fixture
async def log(places: Callable[[str], Awaitable[Bus]]) -> EventLog:
    """The stream, not yet made, as its owner has it."""
    return (await places("events")).transport.event_log(credentials.stream_name("n1"), "wherry.ev.v1.n1.>")


@pytest.fixture
async def stream(log: EventLog) -> EventLog:
    await log.ensure(max_age=3600, max_bytes=1 << 24)
    return log
