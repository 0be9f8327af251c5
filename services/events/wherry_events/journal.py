"""The rules of the stream: what may be published, and how it is read again from a time or a token."""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime
from typing import Any

from wherry_shared.api.events import Envelope, Replay, Stream
from wherry_shared.bus import Bus, events, subjects
from wherry_shared.bus.transport import EventLog, LogState
from wherry_shared.errors import InvalidArgument, OutOfRange
from wherry_shared.filters import compile_filters
from wherry_shared.values import now

LIMIT_MAX = 1000
EVENT_BYTES_MAX = 256 << 10
# Of events as they stand in the stream. Numbers may take twice as much in an answer, which must stay under 1 MiB.
WINDOW_BYTES = 384 << 10


class Journal:
    """The node's events, durable and replayable."""

    def __init__(self, log: EventLog, bus: Bus) -> None:
        self._log = log
        self._bus = bus

    async def publish(self, namespace: str, topic: str, event: dict[str, Any], *, key: str = "") -> Envelope:
        """Publish a caller's own event. The same idempotency key is the same event."""
        event_id = hashlib.sha256(key.encode()).hexdigest()[:24] if key else secrets.token_hex(12)
        envelope = Envelope(
            id=event_id, timestamp=now(), namespace=namespace, topic=topic, node=self._bus.node, event=event
        )
        await self.append(envelope)
        return envelope

    async def append(self, envelope: Envelope) -> None:
        """Put an event into the stream as it is. InvalidArgument: topic, id or size are not allowed."""
        if not 1 <= len(envelope.id) <= 128:
            raise InvalidArgument("an event's id has 1 to 128 characters")
        subject = subjects.event(self._bus.node, envelope.namespace, envelope.topic)
        data = events.encode(envelope)
        if len(data) > EVENT_BYTES_MAX:
            raise InvalidArgument(f"event of {len(data)} bytes is larger than {EVENT_BYTES_MAX}")
        await events.publish(self._bus.transport, subject, data, envelope.id)

    async def bounds(self) -> Stream:
        """The stream's epoch and its first and last number."""
        state = await self._log.state()
        return Stream(epoch=state.epoch, first=state.first, last=state.last)

    async def replay(
        self, namespace: str, *, since: datetime | None, token: str, filters: list[str], limit: int
    ) -> Replay:
        """A window of the stream. OutOfRange: what follows the token is gone, or it is of another stream."""
        if since is not None and since.tzinfo is None:
            raise InvalidArgument(f"since {since.isoformat()} has no time zone")
        matches = compile_filters(filters)
        limit = max(1, min(limit, LIMIT_MAX))
        state = await self._log.state()
        after = _position(token, state) if token else 0
        stored = await self._log.read(
            after=after, since=None if token else since, limit=limit,
            subject=events.pattern(self._bus.node, namespace, "") if namespace else "",
        )  # fmt: skip
        found: list[Envelope] = []
        position, size = after, 0
        for entry in stored:
            if size and size + len(entry.data) > WINDOW_BYTES:
                break
            position, size = entry.sequence, size + len(entry.data)
            envelope = events.decode(entry.data)
            if envelope is not None and matches(events.field_of(envelope)):
                found.append(envelope)
        # An answer without an event still moves the token on, or a reader would never get past what is filtered out.
        complete = len(stored) < limit and (not stored or position == stored[-1].sequence)
        if complete:
            position = max(position, state.last)
        return Replay(events=found, token=f"{state.epoch}/{position}", more=position < state.last)


def _position(token: str, state: LogState) -> int:
    """The number that a token stands for. OutOfRange when the stream does not go on from there."""
    of, _, number = token.rpartition("/")
    if not (number.isascii() and number.isdigit()) or len(number) > 19:
        raise InvalidArgument("the token is not one of this service's")
    position = int(number)
    if of != state.epoch:
        raise OutOfRange("the stream was made anew since this token was given: read the state again")
    if position + 1 < state.first:
        raise OutOfRange(f"{state.first - position - 1} events after this token are no longer kept")
    if position > state.last:  # a crash took the stream's end: what comes next would get numbers that were read before
        raise OutOfRange(f"the stream ends {position - state.last} events before this token: read the state again")
    return position
