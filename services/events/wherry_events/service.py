"""The edge of the events service: whose events a caller sees and publishes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from wherry_shared import context
from wherry_shared.api.events import Envelope, Events, Replay, Stream
from wherry_shared.errors import PermissionDenied

from .journal import Journal


class EventsService(Events):
    """Serves the journal; in no namespace a replay covers all of them."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def publish(self, topic: str, event: dict[str, Any] = {}) -> Envelope:
        return await self._journal.publish(context.namespace(), topic, event, key=context.current().key)

    async def forward(self, envelope: Envelope) -> None:
        namespace = context.namespace()
        if envelope.namespace != namespace:
            raise PermissionDenied(f"an event of namespace {envelope.namespace!r} cannot be forwarded in {namespace!r}")
        await self._journal.forward(envelope)

    async def replay(
        self,
        since: datetime | None = None,
        token: str = "",
        filters: list[str] = [],
        limit: int = 500,
        until: datetime | None = None,
    ) -> Replay:
        namespace = context.current().namespace
        return await self._journal.replay(
            "" if namespace == context.NO_NAMESPACE else namespace, since=since, until=until, token=token,
            filters=filters, limit=limit,
        )  # fmt: skip

    async def stream(self) -> Stream:
        return await self._journal.bounds()
