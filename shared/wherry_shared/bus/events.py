"""Events on the bus: how one is written, published until the stream has it, and read."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from pydantic import ValidationError

from ..api.events import Envelope
from ..errors import ResourceExhausted, Unavailable
from . import subjects
from .transport import Message, NoResponders, Subscription, Transport

MESSAGE_ID = "Nats-Msg-Id"
ACK_TIMEOUT = 5.0
_REMEMBERED = 8192


def encode(envelope: Envelope) -> bytes:
    """The event as it stands on the bus: JSON, so that any tool on the bus can read it (docs/decisions/0002)."""
    return envelope.model_dump_json().encode()


def decode(data: bytes) -> Envelope | None:
    """The event of a message; None for what is no event."""
    try:
        return Envelope.model_validate_json(data)
    except ValidationError:
        return None


async def publish(transport: Transport, subject: str, data: bytes, event_id: str) -> int:
    """Publish one event and wait until the stream has it; answers its number there. Unavailable when it has not.

    The same `event_id` again is one event (the stream's duplicate window).
    """
    try:
        answer = await transport.request(subject, data, headers={MESSAGE_ID: event_id}, timeout=ACK_TIMEOUT)
    except NoResponders:
        raise Unavailable("no stream takes events: the events service is not up") from None
    try:
        ack: Any = json.loads(answer.data)
        sequence = int(ack["seq"])
    except (ValueError, KeyError, TypeError):
        raise Unavailable(f"the stream refused the event: {answer.data[:200]!r}") from None
    return sequence


class Subscriber:
    """Events as they happen: `async for envelope in subscriber`. Each event once, in the order of its publisher.

    What the reader does not take is kept up to `limit` events; beyond that it gets ResourceExhausted, which says
    how many it missed, and can catch up by a replay.
    """

    def __init__(self, limit: int) -> None:
        self._queue: asyncio.Queue[Envelope] = asyncio.Queue(limit)
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._missed = 0
        self._subscription: Subscription | None = None

    async def start(self, transport: Transport, subject: str) -> None:
        self._subscription = await transport.subscribe(subject, self._on_message)
        await transport.flush()

    def _on_message(self, message: Message) -> None:
        envelope = decode(message.data)
        if envelope is None or not self.first(envelope.id):
            return
        try:
            self._queue.put_nowait(envelope)
        except asyncio.QueueFull:
            self._missed += 1

    def first(self, event_id: str) -> bool:
        """Whether this event was not seen before; a publisher that lost an ack sends it again."""
        if event_id in self._seen:
            return False
        self._seen[event_id] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return True

    def __aiter__(self) -> AsyncIterator[Envelope]:
        return self

    async def __anext__(self) -> Envelope:
        if self._missed and self._queue.empty():
            missed, self._missed = self._missed, 0
            raise ResourceExhausted(f"the subscriber was too slow: {missed} events missed; replay them")
        return await self._queue.get()

    async def close(self) -> None:
        """Take no more events."""
        if self._subscription is not None:
            await self._subscription.unsubscribe()
            self._subscription = None

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
