"""The rules of the stream: what may be published, and how it is read again without a hole that nobody is told of."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn, cast

from wherry_shared.api.events import Envelope, Gap, Replay, Stream
from wherry_shared.bus import Bus, events, subjects
from wherry_shared.bus.transport import EventLog, LogState, Stored
from wherry_shared.contract import Encoded, pack
from wherry_shared.errors import InvalidArgument, OutOfRange
from wherry_shared.filters import compile_filters
from wherry_shared.values import check_identifier, now

from .kept import Entry, Kept
from .mark import DIGEST_LENGTH, Mark, digest

LIMIT_MAX = 1000
EVENT_BYTES_MAX = 256 << 10
# Of events as they stand in the stream. Numbers may take twice as much in an answer, which must stay under 1 MiB.
WINDOW_BYTES = 384 << 10
# How many events one call looks at, for those that filters let through.
SCAN_MAX = 4096
_TURN = 0.005  # seconds of that before other requests have their turn
_EARLIEST = datetime(1970, 1, 2, tzinfo=UTC)


class Journal:
    """The node's events, durable and replayable."""

    def __init__(self, log: EventLog, bus: Bus, kept: Kept, mark: Mark | None = None) -> None:
        self._log = log
        self._kept = kept
        self._mark = mark or Mark(log, bus.transport)
        self._node = bus.node
        self._transport = bus.transport

    # ---- writing

    async def publish(self, namespace: str, topic: str, event: dict[str, Any], *, key: str = "") -> Envelope:
        """Publish a caller's own event, stamped now. The same idempotency key is the same event."""
        subject = subjects.event(self._node, namespace, topic)
        event_id = hashlib.sha256(key.encode()).hexdigest()[:24] if key else secrets.token_hex(12)
        at = now()
        try:
            told = events.encode_event(event)
        except ValueError as e:  # bytes that are no text, say
            raise InvalidArgument(f"the event cannot be written as JSON: {e}") from None
        data = events.encode_parts(event_id, at.isoformat(), namespace, topic, self._node, told)
        await self._put(events.Outgoing(subject, data, event_id))
        # As it travels (contract.Encoded): a model would be made of it only to be taken apart again.
        answer = {"id": event_id, "timestamp": at, "namespace": namespace, "topic": topic, "node": self._node}
        return cast(Envelope, Encoded(pack({**answer, "event": event})))

    async def forward(self, envelope: Envelope) -> None:
        """Put an event that happened elsewhere into the stream as it is.

        InvalidArgument: it has no id, time or node that one could go by; and what `append` raises.
        """
        known = envelope.id  # it travels as a header's value, of which blanks around it are no part
        if not (1 <= len(known) <= 128 and known.isascii() and known.isprintable() and known == known.strip()):
            raise InvalidArgument(
                "an event's id has 1 to 128 characters, printable ones of ASCII, no blank at its ends"
            )
        if envelope.timestamp.tzinfo is None or envelope.timestamp < _EARLIEST:
            raise InvalidArgument(
                f"timestamp {envelope.timestamp.isoformat()} says no time: it needs a zone and a date"
            )
        if envelope.node:
            check_identifier(envelope.node, "node")
        await self.append(envelope)

    async def append(self, envelope: Envelope) -> None:
        """Put an event into the stream. InvalidArgument: its topic, its size, or a value that JSON does not have."""
        subject = subjects.event(self._node, envelope.namespace, envelope.topic)
        try:
            data = events.encode(envelope)
        except ValueError as e:  # bytes that are no text, say
            raise InvalidArgument(f"the event cannot be written as JSON: {e}") from None
        await self._put(events.Outgoing(subject, data, envelope.id))

    async def _put(self, event: events.Outgoing) -> None:
        """Return when the stream has it and it is kept. InvalidArgument: its size, or what is no number in JSON."""
        data = event.data
        if len(data) > EVENT_BYTES_MAX:
            raise InvalidArgument(f"event of {len(data)} bytes is larger than {EVENT_BYTES_MAX}")
        if b"NaN" in data or b"Infinity" in data:  # perhaps in a text
            json.loads(data, parse_constant=_no_number)
        entry = Entry(event, self._mark.has)
        events.send(self._transport, event, entry)
        self._kept.keep(entry)
        await entry

    # ---- reading

    async def bounds(self) -> Stream:
        """The stream's epoch, its first and last number, and the token of its end."""
        state = await self._mark.state()
        end = await self._end(state)
        return Stream(epoch=state.epoch, first=state.first, last=state.last, token=end.token(state.epoch))

    async def replay(
        self, namespace: str, *, since: datetime | None, until: datetime | None, token: str, filters: list[str],
        limit: int,
    ) -> Replay:  # fmt: skip
        """A window of the stream. OutOfRange: what follows the token is gone, or it is of another stream."""
        for name, at in (("since", since), ("until", until)):
            if at is not None and at.tzinfo is None:
                raise InvalidArgument(f"{name} {at.isoformat()} has no time zone")
        matches = compile_filters(filters)
        prefix = events.pattern(self._node, namespace, "")[:-1] if namespace else ""
        state = await self._mark.state()
        window = _Window(state, until, max(1, min(limit, LIMIT_MAX)))
        stored = await self._begin(window, token, since)
        turn = time.monotonic() + _TURN
        while stored:
            for entry in stored:
                if time.monotonic() > turn:
                    await asyncio.sleep(0)
                    turn = time.monotonic() + _TURN
                if not window.reaches(entry):
                    return window.replay()
                envelope = events.decode(entry.data) if entry.subject.startswith(prefix) else None
                window.take(entry, envelope if envelope is not None and matches(events.field_of(envelope)) else None)
            if window.place.sequence >= state.last or window.is_full:
                return window.replay()
            stored = await self._read(window.place.sequence, window.wanted(bool(filters or namespace)))
        window.end()
        return window.replay()

    async def _begin(self, window: _Window, token: str, since: datetime | None) -> list[Stored]:
        """Set the window to where it begins; what follows there."""
        state = window.state
        if token:
            place = _Place.of(token, state)
            if not place.digest or place.sequence < state.first:
                window.begin(place)
                return await self._read(place.sequence, window.limit)
            stored = await self._read(place.sequence - 1, window.limit + 1)
            if not stored or stored[0].sequence != place.sequence or digest(stored[0].data) != place.digest:
                raise OutOfRange("the stream lost the event that this token stands on: read the state again")
            window.begin(place)
            return stored[1:] or await self._read(place.sequence, window.limit)
        if since is None:
            stored = await self._read(0, window.limit)
            first = state.first
            if stored and stored[0].sequence > first:  # expired meanwhile, or lost
                first = min((await self._mark.state()).first, stored[0].sequence)
            window.begin(_Place(max(first, 1) - 1))
            return stored
        stored = [entry for entry in await self._log.read(since=since, limit=window.limit) if _is_sound(entry)]
        if not stored:
            window.begin(await self._end(state))
            return []
        before = stored[0].sequence - 1
        if before >= state.first and not await self._at(before):
            before -= 1  # the one before the first is lost: perhaps it is of that time
        window.begin(_Place(before))
        return stored

    async def _read(self, after: int, limit: int) -> list[Stored]:
        """Some events that follow, or none when none do. What is damaged counts as missing."""
        while stored := await self._log.read(after=after, limit=limit):
            sound = [entry for entry in stored if _is_sound(entry)]
            if sound:
                return sound
            after = stored[-1].sequence
        return []

    async def _end(self, state: LogState) -> _Place:
        """The place behind everything."""
        last = await self._at(state.last) if state.last >= max(state.first, 1) else None
        return _Place(state.last, digest(last.data) if last else "")

    async def _at(self, sequence: int) -> Stored | None:
        """The event of that number, if the stream has it."""
        found = await self._log.read(after=sequence - 1, limit=1)
        return found[0] if found and found[0].sequence == sequence and _is_sound(found[0]) else None


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in the stream: behind the event of that number, whose digest tells it from another of the same number.

    A stream that lost its end gives the numbers again. No digest: that event was not there to be read.
    """

    sequence: int
    digest: str = ""

    def token(self, epoch: str) -> str:
        return f"{epoch}/{self.sequence}/{self.digest}"

    @classmethod
    def of(cls, token: str, state: LogState) -> _Place:
        """The place that a token stands for. OutOfRange when the stream does not go on from there."""
        epoch, _, told = token.rpartition("/")
        epoch, _, number = epoch.rpartition("/")
        if not (number.isascii() and number.isdigit()) or len(number) > 19 or len(told) not in (0, DIGEST_LENGTH):
            raise InvalidArgument("the token is not one of this service's")
        position = int(number)
        if epoch != state.epoch:
            raise OutOfRange("the stream was made anew or lost events since this token was given: read the state again")
        if position + 1 < state.first:
            raise OutOfRange(f"{state.first - position - 1} events after this token are no longer kept")
        if position > state.last:  # a crash took the stream's end: what comes next gets numbers that were read before
            raise OutOfRange(f"the stream ends {position - state.last} events before this token: read the state again")
        return cls(position, told)


class _Window:
    """What one replay answers, as it grows. It ends before a hole: so a hole stands at a window's beginning, if any."""

    def __init__(self, state: LogState, until: datetime | None, limit: int) -> None:
        self.state = state
        self.limit = limit
        self.place = _Place(0)
        self._until = until
        self._found: list[Envelope] = []
        self._tokens: list[str] = []
        self._gap: Gap | None = None
        self._scanned = self._size = 0
        self._over = False  # nothing that follows is wanted

    def begin(self, place: _Place) -> None:
        self.place = place

    @property
    def is_full(self) -> bool:
        """Whether it takes no further event."""
        return self._scanned >= SCAN_MAX or len(self._found) >= self.limit

    def wanted(self, filtered: bool) -> int:
        """How many more events to read. A stream that is asked for none never answers."""
        return LIMIT_MAX if filtered else self.limit - len(self._found)

    def reaches(self, entry: Stored) -> bool:
        """Whether the window goes on to this event."""
        if self._until is not None and entry.at >= self._until:
            self._over = True
            return False
        if self.is_full:
            return False
        if self._found and self._size + len(entry.data) > WINDOW_BYTES:
            return False
        return entry.sequence == self.place.sequence + 1 or self._missing(entry.sequence - 1)

    def _missing(self, last: int) -> bool:
        """Note the hole that ends with this number; False when the window has to end before it."""
        if self._scanned:
            return False
        self._gap = Gap(first=self.place.sequence + 1, last=last)
        return True

    def take(self, entry: Stored, envelope: Envelope | None) -> None:
        """Go on behind this event, and give it to the reader unless it is None."""
        self.place = _Place(entry.sequence, digest(entry.data))
        self._scanned += 1
        if envelope is not None:
            self._size += len(entry.data)
            self._found.append(envelope)
            self._tokens.append(self.place.token(self.state.epoch))

    def end(self) -> None:
        """Nothing more can be read: if the stream says that there is more, that is lost."""
        if self.place.sequence < self.state.last and self._missing(self.state.last):
            self.place = _Place(self.state.last)

    def replay(self) -> Replay:
        return Replay(
            events=self._found, token=self.place.token(self.state.epoch), tokens=self._tokens, gap=self._gap,
            more=not self._over and self.place.sequence < self.state.last,
        )  # fmt: skip


def _is_sound(entry: Stored) -> bool:
    """Whether it is as it was published; where no checksum is left, whether it is an event at all."""
    if entry.sum is None:
        return events.decode(entry.data) is not None
    return entry.sum == events.checksum(entry.subject, entry.data)


def _no_number(constant: str) -> NoReturn:
    raise InvalidArgument(f"the event has {constant} in it, which JSON does not have")
