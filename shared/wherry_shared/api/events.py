"""The events service: the durable stream of what happened (containerd's rules)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Protocol

from ..contract import Contract, endpoint
from ..errors import OutOfRange, Unavailable
from ..values import Identifier, Model


class Envelope(Model):
    """One event, as it stands (in JSON) on `wherry.ev.v1.<node>.<namespace>.<topic>` and in the stream.

    id: unique; a subscriber who sees it twice has seen one event. topic: containerd's, `/tasks/exit`.
    """

    id: str
    timestamp: datetime
    namespace: Identifier
    topic: str
    node: str = ""
    event: dict[str, Any] = {}


class Replay(Model):
    """A window of the stream. `token` continues after its last event; `more` tells whether more is there now."""

    events: list[Envelope]
    token: str
    more: bool = False


class Stream(Model):
    """What the stream holds. A changed epoch says that it was made anew: tokens of an old one are void."""

    epoch: str
    first: int
    last: int


class Events(Contract, Protocol, service="events", version="1.0.0", namespaced=None):
    """What happened, durably and replayably. In no namespace (`_`) a replay covers all of them."""

    @endpoint(Unavailable, mutates=True)
    async def publish(self, topic: str, event: dict[str, Any] = {}) -> Envelope:
        """Publish an event of the caller's own in its namespace; answered when the stream has it."""
        ...

    @endpoint(Unavailable, mutates=True)
    async def forward(self, envelope: Envelope) -> None:
        """Publish an event that happened elsewhere, as it is; answered when the stream has it."""
        ...

    @endpoint(OutOfRange, Unavailable)
    async def replay(
        self, since: datetime | None = None, token: str = "", filters: list[str] = [], limit: int = 500
    ) -> Replay:
        """The events since a time, or after a token; from the first that is kept when neither is given.

        OutOfRange: the token is of another stream, or what follows it is no longer kept.
        """
        ...

    @endpoint(Unavailable)
    async def stream(self) -> Stream:
        """The stream's epoch and bounds."""
        ...
