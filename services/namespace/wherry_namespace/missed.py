"""What came into being while nobody listened here: the stream of events still has it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from wherry_shared.api.events import Envelope, Events
from wherry_shared.bus.credentials import CREATIONS
from wherry_shared.errors import OutOfRange
from wherry_shared.sqlite import Database

from . import metadata
from .registry import Registry

DELETED = "/namespaces/delete"
_FILTERS = [f'topic=="{topic}"' for topic in (*CREATIONS, DELETED)]
_WINDOW = 1000


class Missed:
    """Reads the stream on from where it was read last; that place survives the process."""

    def __init__(self, registry: Registry, database: Database, events: Events) -> None:
        self._registry = registry
        self._database = database
        self._events = events

    async def look(self) -> None:
        """Tell the registry of each namespace in which something came into being since. Unavailable."""
        token = metadata.place(self._database)
        seen = _Seen()
        while True:
            try:
                window = await self._events.replay(token=token, filters=_FILTERS, limit=_WINDOW)
            except OutOfRange:  # it is no longer kept, or the stream is another one
                token = ""
                continue
            seen.take(window.events)
            token = window.token
            if not window.more:
                break
        for name, at in seen.created.items():
            await self._registry.seen(name, at)
        await self._database.write(lambda tx: metadata.set_place(tx, token))


class _Seen:
    """Of each namespace its last creation, unless that was before the namespace's deletion."""

    def __init__(self) -> None:
        self.created: dict[str, datetime] = {}
        self._deleted: dict[str, datetime] = {}

    def take(self, events: Sequence[Envelope]) -> None:
        """The events come in the stream's order: a creation may stand behind a deletion that came after it."""
        for event in events:
            name, at = event.namespace, event.timestamp
            if event.topic == DELETED:
                self._deleted[name] = at
                if name in self.created and self.created[name] <= at:
                    del self.created[name]
            elif name not in self._deleted or at > self._deleted[name]:
                self.created[name] = at
