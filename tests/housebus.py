"""A node's bus over a real nats-server for tests: every service as its own user, the callers as the admin.

    with HouseServer(tmp_path) as house:           # a nats-server with the generated users and permissions
        bus = await house.bus()                    # what a suite takes: serve, proxy and subscribe on one object
        tenant = await house.connect("tenant-x")   # or one connection of one user

A suite that runs here proves that the generated permissions let everything through that has to pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from natsd import NatsServer, make_key
from wherry_shared.bus import Bus, credentials, subjects
from wherry_shared.bus.connection import Connection
from wherry_shared.bus.serve import Server
from wherry_shared.bus.shortcut import Shortcut
from wherry_shared.bus.transport import Answer, Callback, EventLog, LogState, Message, Stored, Subscription, Transport
from wherry_shared.errors import Unavailable, WherryError

NODE = "n1"
EVENTS = "events"
PATIENCE = 60
"""Seconds that a test waits for what comes in milliseconds where the machine has nothing else to do."""
OWNERS = {topic: service for service in credentials.CALLS for topic in credentials.topics(service)}


class HouseServer:
    """A nats-server with the users of node `n1`; `operator` is one more user, who may do everything."""

    def __init__(self, root: Path, *, tenants: Iterable[str] = (), jetstream: bool = True) -> None:
        self.creds = root / "creds"
        self._operator = make_key()
        credentials.issue(self.creds, NODE, tenants)
        self.nats = NatsServer(root / "nats", config=self.config(), jetstream=jetstream, procs=1)

    def config(self) -> str:
        """The generated users as they are now, and the operator."""
        users = (self.creds / credentials.NATS_USERS).read_text()
        operator = f"    {{ nkey: {self._operator.public} }}\n"
        return users.replace("  users = [\n", "  users = [\n" + operator, 1)

    def issue(self, *tenants: str) -> None:
        """Add tenants, and let the running server know."""
        credentials.issue(self.creds, NODE, tenants)
        self.nats.reload(self.config())

    def __enter__(self) -> HouseServer:
        self.nats.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.nats.stop()

    async def connect(self, user: str = credentials.ADMIN, *, direct: Path | None = None, **options: Any) -> Bus:
        """One user's connection, with its real permissions. direct: the state directory, for the direct path too."""
        own = credentials.find(self.creds, user)
        options = {"name": user, "seed": own.seed, "inbox_prefix": own.inbox_prefix, **options}
        transport: Transport = await Connection.connect([self.nats.url], **options)
        if direct is not None:
            transport = Shortcut(transport, direct)
        return Bus(transport, node=NODE, identity_of=credentials.Identities(self.creds), direct=direct)

    async def operator(self) -> Connection:
        """A connection that may do everything: to watch, and to clean up."""
        return await Connection.connect(
            [self.nats.url], name="operator", seed=self._operator.seed, inbox_prefix="_INBOX_operator"
        )

    async def bus(self, direct: Path | None = None) -> HouseBus:
        """Everybody's places on the bus in one object."""
        return HouseBus(self, (await self.connect(direct=direct)).transport, direct)

    async def clean(self) -> None:
        """Forget the events."""
        operator = await self.operator()
        try:
            await operator.request(f"$JS.API.STREAM.DELETE.{credentials.stream_name(NODE)}", b"", timeout=5.0)
        finally:
            await operator.close()


class HouseBus(Bus):
    """Serves each contract over its service's own connection, and calls as the admin."""

    def __init__(self, server: HouseServer, admin: Any, state: Path | None = None) -> None:
        self._state = state
        self._places: dict[str, Bus] = {}
        self.server = server
        super().__init__(_Everybody(self, admin), node=NODE)

    async def of(self, service: str) -> Bus:
        """A service's own place on the bus."""
        if service not in self._places:
            self._places[service] = await self.server.connect(service, direct=self._state)
        return self._places[service]

    def known(self, service: str) -> Bus:
        """The same, where it is there already. Unavailable otherwise."""
        if service not in self._places:
            raise Unavailable(f"{service} is not on the bus yet")
        return self._places[service]

    async def serve(self, implementation: Any, **options: Any) -> Server:
        return await (await self.of(implementation.owner)).serve(implementation, **options)

    async def drain(self, timeout: float = 10.0) -> None:
        for place in self._places.values():
            await place.drain(timeout)

    async def close(self) -> None:
        for place in self._places.values():
            await place.close()
        await self.transport.close()


class _Everybody:
    """The admin's transport, but an event leaves as its service's, and the stream is asked as the events service."""

    def __init__(self, bus: HouseBus, admin: Any) -> None:
        self._bus = bus
        self._admin = admin
        self._asking: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        return bool(self._admin.connected)

    @property
    def max_payload(self) -> int:
        return int(self._admin.max_payload)

    @property
    def inbox_prefix(self) -> str:
        return str(self._admin.inbox_prefix)

    @property
    def on_state(self) -> Any:
        return self._admin.on_state

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        made: Subscription = await self._admin.subscribe(subject, callback, queue=queue)
        return made

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        transport = self._admin
        if subject.startswith(f"{subjects.EV}."):
            transport = self._bus.known(OWNERS.get(subject.split(".")[5], EVENTS)).transport
        transport.publish(subject, data, reply=reply, headers=headers)

    async def request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, timeout: float
    ) -> Message:
        transport = self._admin
        if subject.startswith(f"{subjects.EV}."):
            transport = (await self._bus.of(OWNERS.get(subject.split(".")[5], EVENTS))).transport
        made: Message = await transport.request(subject, data, headers=headers, timeout=timeout)
        return made

    def ask(
        self, subject: str, data: bytes, answer: Answer, *, headers: Mapping[str, str] | None = None, timeout: float
    ) -> None:
        """As its service, which may have to connect first; what waits for that leaves in order."""

        async def forward() -> None:
            try:
                answer.set_result(await self.request(subject, data, headers=headers, timeout=timeout))
            except WherryError as e:
                answer.set_exception(e)

        asking = asyncio.ensure_future(forward())
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)

    async def flush(self, timeout: float = 5.0) -> None:
        await self._admin.flush(timeout)

    async def close(self) -> None:
        await self._admin.close()

    def event_log(self, name: str, subject: str) -> EventLog:
        return _Log(self._bus, name, subject)


class _Log:
    """The stream, asked over the connection of the events service."""

    def __init__(self, bus: HouseBus, name: str, subject: str) -> None:
        self._bus, self._name, self._subject = bus, name, subject

    async def _log(self) -> EventLog:
        return (await self._bus.of(EVENTS)).transport.event_log(self._name, self._subject)

    async def ensure(self, *, max_age: float, max_bytes: int) -> None:
        await (await self._log()).ensure(max_age=max_age, max_bytes=max_bytes)

    async def state(self) -> LogState:
        return await (await self._log()).state()

    async def renew(self) -> None:
        await (await self._log()).renew()

    async def read(self, **window: Any) -> list[Stored]:
        return await (await self._log()).read(**window)
