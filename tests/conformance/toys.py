"""A little contract with a service behind gates, and requests made by hand: what the suites of the bus play with."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import pytest
from housebus import PATIENCE, HouseBus
from wherry_shared import context
from wherry_shared.bus import Bus, subjects
from wherry_shared.bus.direct import Door, Guest
from wherry_shared.bus.proxy import DEADLINE, ERROR_CODE, KEY, LEASE
from wherry_shared.bus.transport import Message
from wherry_shared.contract import Contract, endpoint, immediate, pack
from wherry_shared.errors import ERRORS, AlreadyExists, DeadlineExceeded, NotFound, Unavailable
from wherry_shared.memory import MemoryTransport
from wherry_shared.sqlite import Database, Transaction
from wherry_shared.values import Name

SCHEMA = ("CREATE TABLE things (name TEXT PRIMARY KEY, n INTEGER NOT NULL)",)


class Toys(Contract, Protocol, service="image", version="1.2.3"):
    """A little of everything."""

    @endpoint()
    async def tell(self, word: str = "", anything: Any = None) -> dict[str, Any]:
        """What the service sees of the call."""
        ...

    @endpoint()
    async def pass_gate(self, name: Name) -> str:
        """Wait until the gate is opened."""
        ...

    @endpoint(waits=True)
    async def wait(self, name: Name) -> str:
        """Wait until the gate is opened, among those that wait."""
        ...

    @endpoint(AlreadyExists, mutates=True)
    async def add(self, name: Name, slow: bool = False) -> int:
        """Count."""
        ...

    @endpoint(AlreadyExists, mutates=True)
    async def enter(self, name: Name) -> int:
        """Count behind the gate."""
        ...

    @endpoint(*ERRORS.values())
    async def fail(self, code: int, message: str) -> None:
        """Fail."""
        ...

    @endpoint(NotFound)
    async def now(self, name: Name) -> str:
        """The namespace and the name, at once; not of "b", and "wait" waits."""
        ...

    @endpoint()
    async def fill(self, size: int) -> bytes:
        """So many bytes."""
        ...


class Toy(Toys):
    """Serves Toys; what it did is in `seen`, how many did it at once in `most`."""

    def __init__(self, database: Database | None = None) -> None:
        self.database = database
        self.gates: dict[str, asyncio.Event] = {}
        self.seen: Counter[str] = Counter()
        self.inside = self.most = 0
        self.contexts: list[context.Context] = []

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def until(self, what: str, times: int = 1) -> None:
        """Wait until something was seen so often."""
        async with asyncio.timeout(PATIENCE):
            while self.seen[what] < times:
                await asyncio.sleep(0.001)

    async def tell(self, word: str = "", anything: Any = None) -> dict[str, Any]:
        self.seen["tell"] += 1
        now = context.current()
        self.contexts.append(now)
        return {"word": word, "anything": anything, "namespace": now.namespace, "lease": now.lease, "trace": now.trace}

    async def pass_gate(self, name: str) -> str:
        self.seen["began"] += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await self.gate(name).wait()
            self.seen["ended"] += 1
            return name
        except asyncio.CancelledError:
            self.seen["cancelled"] += 1
            raise
        finally:
            self.inside -= 1

    async def wait(self, name: str) -> str:
        return await self.pass_gate(name)

    async def add(self, name: str, slow: bool = False) -> int:
        self.seen["add"] += 1
        if self.database is None:
            await asyncio.sleep(0)
            return self.seen["add"]

        def write(tx: Transaction) -> int:
            if slow:
                time.sleep(0.02)
            tx.execute("INSERT INTO things VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET n = n + 1", (name,))
            n: int = tx.one("SELECT n FROM things WHERE name = ?", (name,))[0]
            return n

        return await self.database.mutate(write)

    async def enter(self, name: str) -> int:
        await self.pass_gate(name)
        return await self.add(name)

    async def fail(self, code: int, message: str) -> None:
        if code in ERRORS:
            raise ERRORS[code](message)
        raise {100: ValueError, 101: TimeoutError, 102: asyncio.CancelledError, 103: RecursionError}[code](message)

    @immediate
    async def now(self, name: str) -> str:
        if name == "b":
            raise NotFound("no b")
        if name == "wait":
            await asyncio.sleep(0)
        return f"{context.namespace()} {name}"

    async def fill(self, size: int) -> bytes:
        return b"\xa5" * size


def subject(bus: Bus, method: str, namespace: str = "default") -> str:
    return f"{subjects.RPC}.{bus.node}.{namespace}.image.{method}"


async def ask(bus: Bus, method: str, body: Any = None, *, namespace: str = "default", **headers: str) -> Message:
    """A request by hand. Headers are given as key=, deadline= and so on."""
    names = {"key": KEY, "deadline": DEADLINE, "lease": LEASE}
    data = body if isinstance(body, bytes) else pack(body or {})
    return await bus.transport.request(
        subject(bus, method, namespace), data, headers={names[k]: v for k, v in headers.items()}, timeout=PATIENCE
    )


async def nobody_answers(tell: Callable[[], Awaitable[Any]]) -> None:
    """Assert that a call ends so. The deadline may pass under its last attempt, of which nobody knows anything then."""
    for seconds in (0.1, 0.3, 1.0, 3.0, 9.0):
        with context.use(timeout=seconds), pytest.raises((Unavailable, DeadlineExceeded)) as caught:
            await tell()
        if caught.type is Unavailable:
            break
    assert re.search(r"^image\.tell: no service answers on the bus", str(caught.value))


def code(answer: Message) -> int:
    return int((answer.headers or {}).get(ERROR_CODE, "0"))


class Tap:
    """Every message on the bus under `wherry.`, requests and events alike, and every request on the direct path."""

    def __init__(self) -> None:
        self.subjects: list[str] = []

    def __call__(self, message: Message) -> None:
        self.subjects.append(message.subject)


@contextlib.asynccontextmanager
async def tapped(bus: Bus) -> AsyncIterator[Tap]:
    tap = Tap()
    if isinstance(bus, HouseBus):
        transport: Any = await bus.server.operator()
    else:
        assert isinstance(bus.transport, MemoryTransport)
        transport = MemoryTransport(bus.transport.broker)
    await transport.subscribe("wherry.>", tap)
    request = Door.request

    def noted(door: Door, guest: Guest, message: Any) -> None:
        tap(message)
        request(door, guest, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Door, "request", noted)
        yield tap
        # What is asked for now comes after all that was asked for before.
        await ask(bus, "tell", {"word": "last"})
    await transport.flush()
    await transport.close()
