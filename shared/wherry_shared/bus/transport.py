"""The port under the bus: what a connection to it, or one in memory, has to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from ..errors import Unavailable

SUM = "Wherry-Sum"
"""The header with an event's checksum (events.checksum), which the stream keeps with it."""


class NoResponders(Unavailable):
    """Nobody serves that subject right now: the service is down or starting."""


class Lost(Unavailable):
    """The way that a request went has ended before its answer: nobody knows whether it took effect."""


class Message(Protocol):
    """One received message; `reply` is "" when none is wanted."""

    @property
    def subject(self) -> str: ...
    @property
    def reply(self) -> str: ...
    @property
    def headers(self) -> Mapping[str, str] | None: ...
    @property
    def data(self) -> bytes: ...


Callback = Callable[[Message], None]
"""Called synchronously for each message, in order; it must neither block nor raise."""


class Answer(Protocol):
    """Whom an answer is for, told once: an asyncio.Future[Message], or what counts the answers of several requests."""

    def done(self) -> bool:
        """Whether nobody waits for it any more."""
        ...

    def set_result(self, message: Any, /) -> None: ...
    def set_exception(self, error: Any, /) -> None: ...


class Subscription(Protocol):
    """An interest in a subject."""

    async def unsubscribe(self) -> None:
        """End it now."""
        ...

    async def drain(self) -> None:
        """End it; what the bus has handed over by now is still delivered before this returns."""
        ...


class Publisher(Protocol):
    """A way for an answer: the bus, or the connection that the request came on."""

    @property
    def max_payload(self) -> int: ...

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Send, and forget. Unavailable when not connected, InvalidArgument over `max_payload`."""
        ...


class Transport(Publisher, Protocol):
    """Publishes, subscribes and asks. Nothing is ever buffered while it is not connected."""

    @property
    def on_state(self) -> list[Callable[[bool], None]]:
        """Called with False when the connection drops or is closed, with True when it is back and subscribed again."""
        ...

    @property
    def connected(self) -> bool: ...
    @property
    def inbox_prefix(self) -> str: ...

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Interest in a subject; one of a `queue` group gets each message. PermissionDenied when refused."""
        ...

    async def request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, timeout: float
    ) -> Message:
        """Ask, and wait up to `timeout` seconds for one answer.

        NoResponders at once when nobody listens, Unavailable when the connection is or gets lost, Lost when the
        request may be sent again at once, PermissionDenied when the bus refuses the subject, DeadlineExceeded at the
        timeout.
        """
        ...

    def ask(
        self, subject: str, data: bytes, answer: Answer, *, headers: Mapping[str, str] | None = None, timeout: float
    ) -> None:
        """Send a request whose answer, or why there is none, is told to `answer`; it always goes by the bus.

        Raises what `publish` raises: nothing is told then. `answer` is called from where messages are read: it must
        neither block nor raise.
        """
        ...

    async def flush(self, timeout: float = 5.0) -> None:
        """Return when the bus has taken all that was published."""
        ...

    async def close(self) -> None:
        """Disconnect for good: what is asked from then on is FailedPrecondition."""
        ...

    def event_log(self, name: str, subject: str) -> EventLog:
        """The durable stream `name` over `subject`; for its owner, the events service."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """One event of the stream: its number there, its body, and when the stream got it.

    sum: what `events.checksum` said of it when it was published; None when nothing says so.
    """

    sequence: int
    subject: str
    data: bytes
    at: datetime
    sum: str | None = None


@dataclass(frozen=True, slots=True)
class LogState:
    """The stream's bounds; `epoch` changes when it is made anew, or renewed."""

    epoch: str
    first: int
    last: int


class EventLog(Protocol):
    """The durable stream of events: what is published on its subjects is kept, once per `Nats-Msg-Id`."""

    async def ensure(self, *, max_age: float, max_bytes: int) -> None:
        """Make the stream, or change its bounds (seconds, bytes)."""
        ...

    async def state(self) -> LogState: ...

    async def renew(self) -> None:
        """Give the stream another epoch: nothing that was known of its numbers holds any more."""
        ...

    async def read(self, *, after: int = 0, since: datetime | None = None, limit: int = 500) -> list[Stored]:
        """Up to `limit` events after a sequence number, or since a time; none means that there are none.

        What the stream has lost is passed over: the numbers are what shows it.
        """
        ...
