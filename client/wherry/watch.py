"""Events from the past into the present, without a hole: subscribe first, then replay, then go on live.

What a lost bus or a slow reader made us miss is replayed from the last event that was read, and goes on.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from wherry_shared.api.events import Envelope, Events
from wherry_shared.bus.events import field_of
from wherry_shared.errors import InvalidArgument, ResourceExhausted, Unavailable
from wherry_shared.filters import compile_filters
from wherry_shared.values import now

if TYPE_CHECKING:
    from .client import Client

# Events of several services reach the stream in another order than they are stamped; this far apart at the most.
OVERLAP = timedelta(seconds=10)
REMEMBERED = 65536
PAUSE = 0.2


async def watch(
    client: Client, *, since: datetime | None, filters: list[str], all_namespaces: bool, follow: bool
) -> AsyncIterator[Envelope]:
    """Events of the client's namespace, or of all; each once."""
    watched = _Watch(client, filters, all_namespaces)
    start, replaying = since or now(), since is not None
    while True:
        try:
            async for envelope in watched.round(start if replaying else None, follow=follow):
                start = max(start, envelope.timestamp - OVERLAP)
                yield envelope
        except (Unavailable, ResourceExhausted):
            if not follow:
                raise
            replaying = True
            await asyncio.sleep(PAUSE)
        else:
            return


class _Watch:
    """What has been told already, and what is wanted."""

    def __init__(self, client: Client, filters: list[str], all_namespaces: bool) -> None:
        self._client = client
        self._filters = filters
        self._matches = compile_filters(filters)
        self._namespace = "*" if all_namespaces else client.namespace
        self._source = client.bus.proxy(Events) if all_namespaces else client.events
        self._told: OrderedDict[str, None] = OrderedDict()

    async def round(self, since: datetime | None, *, follow: bool) -> AsyncIterator[Envelope]:
        """The past since a time, and then the present for as long as it comes without a gap."""
        async with await self._client.bus.subscribe(namespace=self._namespace) as live:
            if since is not None:
                async for envelope in self._past(since):
                    yield envelope
            if not follow:
                return
            async for envelope in live:
                if self._first(envelope) and self._wanted(envelope):
                    yield envelope

    async def _past(self, since: datetime) -> AsyncIterator[Envelope]:
        token, more = "", True
        while more:
            window = await self._source.replay(
                since=None if token else since, token=token, filters=self._filters
            )  # fmt: skip
            for envelope in window.events:
                if self._first(envelope):
                    yield envelope
            token, more = window.token, window.more

    def _wanted(self, envelope: Envelope) -> bool:
        try:
            return self._matches(field_of(envelope))
        except ResourceExhausted as e:  # of the pattern, not of the reader
            raise InvalidArgument(str(e)) from None

    def _first(self, envelope: Envelope) -> bool:
        if envelope.id in self._told:
            return False
        self._told[envelope.id] = None
        if len(self._told) > REMEMBERED:
            self._told.popitem(last=False)
        return True
