"""Events on the bus: how one is written, published until the stream has it, and read."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..api.events import Envelope
from ..errors import DeadlineExceeded, ResourceExhausted, Unavailable, WherryError
from . import subjects
from .protocol import Message as Received
from .transport import SUM, Answer, Message, NoResponders, Subscription, Transport

_ID_LINE = b"\r\nNats-Msg-Id: "
# A PubAck as nats-server writes it; what looks otherwise is read as any JSON.
_ACK = re.compile(rb'\{"stream":"[^"\\]*",(?: ?"domain":"[^"\\]*",)? ?"seq":([1-9]\d*)(?:, ?"duplicate": ?true)?\}')
MESSAGE_ID = "Nats-Msg-Id"
ACK_TIMEOUT = 5.0
_REMEMBERED = 4096  # at least; twice as many at most


def encode(envelope: Envelope) -> bytes:
    """The event as it stands on the bus: JSON, so that any tool on the bus can read it (docs/decisions/0002)."""
    return envelope.model_dump_json().encode()


def encode_parts(id: str, at: str, namespace: str, topic: str, node: str, event: str) -> bytes:
    """The same of what was checked before: `at` in ISO format, `event` as JSON."""
    at = at.replace("+00:00", "Z")
    return (
        f'{{"id":"{id}","timestamp":"{at}","namespace":"{namespace}","topic":"{topic}","node":"{node}","event":{event}}}'
    ).encode()


@functools.cache
def _any_event() -> TypeAdapter[dict[str, Any]]:
    return TypeAdapter(dict[str, Any], config=ConfigDict(ser_json_inf_nan="constants"))


def encode_event(event: dict[str, Any]) -> str:
    """As an Envelope has it in its JSON. ValueError for bytes that are no text; what JSON does not have shows."""
    return _any_event().serializer.to_json(event).decode()


def decode(data: bytes) -> Envelope | None:
    """The event of a message; None for what is no event."""
    try:  # its validator without the layer above it
        return cast(Envelope, Envelope.__pydantic_validator__.validate_json(data))
    except ValidationError:
        return None


def id_of(message: Message) -> str:
    """The id of the event that a message is; "" for what is none."""
    found = message.header(_ID_LINE) if isinstance(message, Received) else (message.headers or {}).get(MESSAGE_ID)
    if found is None:
        envelope = decode(message.data)
        found = "" if envelope is None else envelope.id
    return found


class Outgoing(NamedTuple):
    """An event on its way to the stream; the same `id` again is the same event (the stream's duplicate window)."""

    subject: str
    data: bytes
    id: str


def checksum(subject: str, data: bytes) -> str:
    """What travels and is stored with an event: nats-server hands out of its files what a bit has flipped in."""
    return f"{zlib.crc32(data, zlib.crc32(subject.encode())):08x}"


def _headers(event: Outgoing) -> dict[str, str]:
    return {SUM: checksum(event.subject, event.data), MESSAGE_ID: event.id}


def send(transport: Transport, event: Outgoing, answer: Answer) -> None:
    """Send one event to the stream, whose word is told to `answer`: see `number_of` and `why_not`."""
    transport.ask(event.subject, event.data, answer, headers=_headers(event), timeout=ACK_TIMEOUT)


def number_of(ack: Message) -> int:
    """The number that the stream gave an event. Unavailable when it refused it."""
    known = _ACK.fullmatch(ack.data)
    if known is not None:
        return int(known[1])
    try:
        told = json.loads(ack.data)
    except (ValueError, RecursionError):
        raise Unavailable(f"the stream's answer to an event cannot be read: {ack.data[:200]!r}") from None
    # A refusal has a number, too, which is 0.
    number = told.get("seq") if isinstance(told, dict) and "error" not in told else None
    if not isinstance(number, int) or number < 1:
        raise Unavailable(f"the stream refused the event: {str(told)[:200]}")
    return number


def why_not(error: WherryError) -> WherryError:
    """Why an event is not in the stream, where this came instead of its ack."""
    if isinstance(error, NoResponders):
        return Unavailable("no stream takes events: the events service is not up")
    if isinstance(error, DeadlineExceeded):
        return Unavailable(f"the stream did not acknowledge an event within {ACK_TIMEOUT:g} s")
    return error


async def publish(transport: Transport, event: Outgoing) -> int:
    """Publish one event and wait until the stream has it; answers its number there. Unavailable when it has not."""
    answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    try:
        send(transport, event, answer)
        ack = await answer
    except WherryError as e:
        raise why_not(e) from None
    return number_of(ack)


async def publish_all(transport: Transport, events: Sequence[Outgoing]) -> tuple[int, WherryError | None]:
    """Publish events, all at once, and wait for the stream. Answers how many of them, from the first, it has; and why
    it has not the next one. Of those behind that one it may have some."""
    acks = _Acks(len(events))
    for number, event in enumerate(events):
        ack = _Ack(acks, number)
        try:
            send(transport, event, ack)
        except WherryError as e:
            ack.set_exception(e)
    return await acks.told()


class _Acks:
    """What the stream says of several events: no task and no future for each."""

    def __init__(self, count: int) -> None:
        self._left = self._count = count
        self._all: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refused: dict[int, WherryError] = {}

    async def told(self) -> tuple[int, WherryError | None]:
        """See `publish_all`."""
        if self._left:
            await self._all
        first = min(self._refused, default=self._count)
        return first, self._refused.get(first)

    def done(self) -> bool:
        return self._all.done()

    def note(self, number: int, refused: WherryError | None) -> None:
        if refused is not None:
            self._refused[number] = refused
        self._left -= 1
        if not self._left and not self._all.done():
            self._all.set_result(None)


class _Ack:
    """One of them. Implements transport.Answer."""

    __slots__ = ("_acks", "_number", "done")

    def __init__(self, acks: _Acks, number: int) -> None:
        self._acks = acks
        self._number = number
        self.done = acks.done

    def set_result(self, message: Message, /) -> None:
        try:
            number_of(message)
        except WherryError as e:
            self._acks.note(self._number, e)
        else:
            self._acks.note(self._number, None)

    def set_exception(self, error: WherryError, /) -> None:
        self._acks.note(self._number, why_not(error))


class Subscriber:
    """Events as they happen: `async for envelope in subscriber`. Each event once, in the order of its publisher.

    There is never a hole that is not told: after the last event before it the reader gets ResourceExhausted, when it
    was too slow and more than `limit` events waited, or Unavailable, when the bus was away. It may then read on, and
    catch up by a replay.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._events: deque[bytes] = deque()
        self._more: asyncio.Future[None] | None = None  # where a reader waits
        self._seen: set[str] = set()
        self._seen_before: set[str] = set()
        self._missed = 0
        self._interrupted = False
        self._closed = False
        self._transport: Transport | None = None
        self._subscription: Subscription | None = None

    async def start(self, transport: Transport, subject: str) -> None:
        self._transport = transport
        self._subscription = await transport.subscribe(subject, self._on_message)
        transport.on_state.append(self._on_state)
        await transport.flush()

    def _on_message(self, message: Message) -> None:
        event_id, seen = id_of(message), self._seen
        # A publisher that lost an ack sends an event again.
        if not event_id or event_id in seen or event_id in self._seen_before:
            return
        seen.add(event_id)
        if len(seen) > _REMEMBERED:
            self._seen, self._seen_before = set(), seen
        # After a hole nothing is taken until the reader knows of it: so it is told at the right place.
        if self._missed or self._interrupted or len(self._events) >= self._limit:
            self._missed += 1
        else:
            self._events.append(message.data)
        if self._more is not None:
            self._wake()

    def _on_state(self, connected: bool) -> None:
        if not connected:
            self._interrupted = True
            self._wake()

    def _wake(self) -> None:
        more, self._more = self._more, None
        if more is not None and not more.done():
            more.set_result(None)

    async def _wait(self) -> None:
        """Until there is something to read or to tell, or, for a second reader, until the first has given up."""
        if self._more is None or self._more.done():
            self._more = asyncio.get_running_loop().create_future()
            await self._more
        else:
            await asyncio.wait([self._more])

    def __aiter__(self) -> AsyncIterator[Envelope]:
        return self

    async def __anext__(self) -> Envelope:
        while True:
            while not self._events:
                self._tell()
                if self._closed:
                    raise StopAsyncIteration
                await self._wait()
            envelope = decode(self._events.popleft())
            if envelope is not None:
                return envelope

    def _tell(self) -> None:
        """Raise what has to be known before the next event."""
        missed, interrupted, self._missed, self._interrupted = self._missed, self._interrupted, 0, False
        if interrupted:
            raise Unavailable("the connection to the bus dropped: events may have been missed; replay them")
        if missed:
            raise ResourceExhausted(f"the subscriber was too slow: {missed} events missed; replay them")

    async def close(self) -> None:
        """Take no more events; a reader comes to the end after those that it has not read."""
        self._closed = True
        self._wake()
        if self._subscription is not None and self._transport is not None:
            self._transport.on_state.remove(self._on_state)
            subscription, self._subscription = self._subscription, None
            await subscription.unsubscribe()

    async def __aenter__(self) -> Subscriber:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


def pattern(node: str, namespace: str, topic: str) -> str:
    """The subscription for a node, a namespace and a topic prefix; `*` or "" stands for any of each."""
    node_token = node if node == "*" else subjects.encode_token(node, "node")
    namespace_token = namespace if namespace == "*" else subjects.encode_token(namespace, "namespace")
    if topic in ("", "*", ">"):
        return f"{subjects.EV}.{node_token}.{namespace_token}.>"
    return f"{subjects.EV}.{node_token}.{namespace_token}." + ".".join(
        part.replace(".", "~") for part in subjects.check_topic(topic)
    )


def field_of(envelope: Envelope) -> Callable[[tuple[str, ...]], str | None]:
    """The fields that filters see: `namespace`, `topic`, `event.<field>` (containerd's event adaptor).

    Numbers and booleans are as in JSON; an empty text is absent. What is left of a path may be one key with dots.
    """

    def field(path: tuple[str, ...]) -> str | None:
        if path == ("namespace",):
            return envelope.namespace
        if path == ("topic",):
            return envelope.topic
        value: Any = envelope.event if path[:1] == ("event",) else None
        for place, part in enumerate(path[1:], 1):
            if not isinstance(value, dict):
                return None
            if part not in value:
                value = value.get(".".join(path[place:]))
                break
            value = value[part]
        if isinstance(value, bool):
            return "true" if value else "false"
        return str(value) or None if isinstance(value, str | int) else None

    return field
