"""The same bus in memory, for tests and for embedding: NATS's matching, queue groups and no-responders, one process."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from .bus.events import MESSAGE_ID
from .bus.protocol import encode_headers, parse_headers
from .bus.subjects import matches
from .bus.transport import Answer, Callback, EventLog, LogState, NoResponders, Stored, Subscription
from .errors import DeadlineExceeded, InvalidArgument, Unavailable, WherryError

MAX_PAYLOAD = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryMessage:
    subject: str
    reply: str
    headers: Mapping[str, str] | None
    data: bytes


@dataclass(eq=False)
class _Interest:
    broker: Broker
    pattern: str
    queue: str
    callback: Callback
    ended: bool = False

    async def unsubscribe(self) -> None:
        self.ended = True
        if self in self.broker.interests:
            self.broker.interests.remove(self)

    async def drain(self) -> None:
        if self in self.broker.interests:
            self.broker.interests.remove(self)
        await asyncio.sleep(0)  # what was handed over is delivered in this turn of the loop
        self.ended = True

    def take(self, message: MemoryMessage) -> None:
        if not self.ended:
            self.callback(message)


@dataclass
class Broker:
    """What nats-server is to the others: give one to each MemoryTransport that is to share a bus."""

    interests: list[_Interest] = field(default_factory=list)
    logs: dict[str, MemoryLog] = field(default_factory=dict)

    def deliver(self, message: MemoryMessage) -> int:
        """Hand a message to everyone interested; answers how many took it."""
        taken = 0
        queues: dict[str, list[_Interest]] = {}
        for interest in self.interests:
            if not matches(interest.pattern, message.subject):
                continue
            if interest.queue:
                queues.setdefault(interest.queue, []).append(interest)
            else:
                self._hand(interest, message)
                taken += 1
        for members in queues.values():
            self._hand(random.choice(members), message)  # noqa: S311 - load sharing
            taken += 1
        for log in self.logs.values():
            if matches(log.subject, message.subject):
                self._keep(log, message)
                taken += 1
        return taken

    @staticmethod
    def _hand(interest: _Interest, message: MemoryMessage) -> None:
        asyncio.get_running_loop().call_soon(interest.take, message)

    def _keep(self, log: MemoryLog, message: MemoryMessage) -> None:
        sequence = log.append(message)
        if message.reply:
            ack = json.dumps({"stream": log.name, "seq": sequence}).encode()
            self.deliver(MemoryMessage(message.reply, "", None, ack))


class _Request:
    """One request under way: its interest in the first answer, and its patience."""

    def __init__(self, broker: Broker, inbox: str, answer: Answer, underway: set[_Request]) -> None:
        self._interest = _Interest(broker, inbox, "", self._take)
        self._answer = answer
        self._underway = underway
        self._timer: asyncio.TimerHandle | None = None
        broker.interests.append(self._interest)
        underway.add(self)

    def fail_after(self, seconds: float, error: WherryError) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self.fail, error)

    def _take(self, message: object) -> None:
        if self.end():
            self._answer.set_result(message)

    def fail(self, error: WherryError) -> None:
        if self.end():
            self._answer.set_exception(error)

    def end(self) -> bool:
        """Expect nothing more; whether somebody still waited."""
        if self._interest.ended:
            return False
        self._interest.ended = True
        self._interest.broker.interests.remove(self._interest)
        self._underway.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        return not self._answer.done()


class MemoryTransport:
    """A connection to a Broker."""

    def __init__(self, broker: Broker | None = None, *, name: str = "memory") -> None:
        self.broker = broker or Broker()
        self.inbox_prefix = f"_INBOX_{name}"
        self.max_payload = MAX_PAYLOAD
        self.connected = True
        self.on_state: list[Callable[[bool], None]] = []
        self._waiting: set[_Request] = set()
        self._tokens = itertools.count(1)

    def _check(self, data: bytes, headers: Mapping[str, str] | None) -> Mapping[str, str] | None:
        """The headers as the other side reads them. Raises what a connection to NATS raises."""
        if not self.connected:
            raise Unavailable("not connected")
        block = encode_headers(headers) if headers else b""
        if len(block) + len(data) > self.max_payload:
            raise InvalidArgument(f"message of {len(block) + len(data)} bytes is larger than {self.max_payload}")
        return parse_headers(block) if headers else None

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        if not self.connected:
            raise Unavailable("not connected")
        interest = _Interest(self.broker, subject, queue, callback)
        self.broker.interests.append(interest)
        return interest

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.broker.deliver(MemoryMessage(subject, reply, self._check(data, headers), data))

    async def request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, timeout: float
    ) -> MemoryMessage:
        answer: asyncio.Future[MemoryMessage] = asyncio.get_running_loop().create_future()
        request = self._send(subject, data, answer, headers, timeout)
        try:
            return await answer
        finally:
            request.end()

    def ask(
        self, subject: str, data: bytes, answer: Answer, *, headers: Mapping[str, str] | None = None, timeout: float
    ) -> None:
        self._send(subject, data, answer, headers, timeout)

    def _send(
        self, subject: str, data: bytes, answer: Answer, headers: Mapping[str, str] | None, timeout: float
    ) -> _Request:
        headers = self._check(data, headers)
        inbox = f"{self.inbox_prefix}.{id(self):x}.{next(self._tokens)}"
        request = _Request(self.broker, inbox, answer, self._waiting)
        if not self.broker.deliver(MemoryMessage(subject, inbox, headers, data)):
            request.fail(NoResponders(f"nobody answers on {subject}"))
        else:
            request.fail_after(timeout, DeadlineExceeded(f"no answer on {subject} within {timeout:.3f} s"))
        return request

    async def flush(self, timeout: float = 5.0) -> None:
        await asyncio.sleep(0)

    async def close(self) -> None:
        self.connected = False
        for request in list(self._waiting):
            request.fail(Unavailable("the connection was closed before an answer came"))

    def event_log(self, name: str, subject: str) -> EventLog:
        return self.broker.logs.setdefault(name, MemoryLog(name, subject))


class MemoryLog:
    """The durable stream's stand-in: kept as long as the Broker."""

    def __init__(self, name: str, subject: str) -> None:
        self.name = name
        self.subject = subject
        self._epoch = f"{random.SystemRandom().getrandbits(64):016x}"
        self._stored: list[Stored] = []
        self._ids: dict[str, int] = {}

    def append(self, message: MemoryMessage) -> int:
        event_id = (message.headers or {}).get(MESSAGE_ID, "")
        if event_id and event_id in self._ids:
            return self._ids[event_id]
        sequence = len(self._stored) + 1
        self._stored.append(Stored(sequence, message.subject, message.data, datetime.now(UTC)))
        self._ids[event_id] = sequence
        return sequence

    async def ensure(self, *, max_age: float, max_bytes: int) -> None:
        return None

    async def renew(self) -> None:
        self._epoch = f"{random.SystemRandom().getrandbits(64):016x}"

    async def state(self) -> LogState:
        return LogState(self._epoch, 1 if self._stored else 0, len(self._stored))

    async def read(self, *, after: int = 0, since: datetime | None = None, limit: int = 500) -> list[Stored]:
        if after or since is None:
            return self._stored[after : after + limit]
        return [stored for stored in self._stored if stored.at >= since][:limit]
