"""The events service: the durable stream of what happened (containerd's rules)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Protocol

from pydantic import ConfigDict

from ..contract import Contract, endpoint
from ..errors import OutOfRange, Unavailable
from ..values import Identifier, Model


class Envelope(Model):
    """One event, as it stands (in JSON) on `wherry.ev.v1.<node>.<namespace>.<topic>` and in the stream.

    id: unique; a subscriber who sees it twice has seen one event. topic: containerd's, `/tasks/exit`.
    """

    # What JSON does not have shows in it, to be refused, and does not become null.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    id: str
    timestamp: datetime
    namespace: Identifier
    topic: str
    node: str = ""
    event: dict[str, Any] = {}


class Gap(Model):
    """Events that the stream has lost to damage: their numbers. What expired is no gap, but OutOfRange."""

    first: int
    last: int


class Replay(Model):
    """A window of the stream. `token` continues after its last event; `more` tells whether more is there now.

    tokens: for each of the events, what continues after it. gap: what is missing before the first of them; there is
    never a hole inside of a window. It is told once: `token` goes on behind it.
    """

    events: list[Envelope]
    token: str
    more: bool = False
    tokens: list[str] = []
    gap: Gap | None = None


class Stream(Model):
    """What the stream holds, and the token of its end. A changed epoch says that it was made anew: tokens are void."""

    epoch: str
    first: int
    last: int
    token: str = ""


class Events(Contract, Protocol, service="events", version="1.1.0", namespaced=None):
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
        self,
        since: datetime | None = None,
        token: str = "",
        filters: list[str] = [],
        limit: int = 500,
        until: datetime | None = None,
    ) -> Replay:
        """The events since a time, or after a token; from the first that is kept when neither is given.

        until: only those that the stream got before. Times are the stream's; an event's own is a little earlier.
        OutOfRange: the token is of another stream, of an event that the stream has lost, or what follows it is no
        longer kept. Who follows the state by events has to read the state again then, and after a `gap`.
        """
        ...

    @endpoint(Unavailable)
    async def stream(self) -> Stream:
        """The stream's epoch and bounds, and the token from which what happens from now on follows."""
        ...
