"""Events from the past into the present, without a hole: subscribe first, then replay, then go on live."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from wherry_shared.api.events import Envelope, Events
from wherry_shared.filters import compile_filters

if TYPE_CHECKING:
    from .client import Client


async def watch(
    client: Client, *, since: datetime | None, filters: list[str], all_namespaces: bool, follow: bool
) -> AsyncIterator[Envelope]:
    """Events of the client's namespace, or of all; each once. ResourceExhausted when the reader was too slow."""
    matches = compile_filters(filters)
    namespace = "*" if all_namespaces else client.namespace
    async with await client.bus.subscribe(namespace=namespace) as live:
        seen: set[str] = set()
        if since is not None:
            source = client.bus.proxy(Events) if all_namespaces else client.events
            token, more = "", True
            while more:
                window = await source.replay(since=since if not token else None, token=token, filters=filters)
                for envelope in window.events:
                    seen.add(envelope.id)
                    yield envelope
                token, more = window.token, window.more
        if not follow:
            return
        async for envelope in live:
            if envelope.id not in seen and matches(partial(field, envelope)):
                yield envelope


def field(envelope: Envelope, path: tuple[str, ...]) -> str | None:
    """A field as filters name it: `namespace`, `topic`, `event.<field>`."""
    if path == ("namespace",):
        return envelope.namespace
    if path == ("topic",):
        return envelope.topic
    if path[:1] == ("event",):
        value: object = envelope.event
        for part in path[1:]:
            value = value.get(part) if isinstance(value, dict) else None
        return str(value) if isinstance(value, str | int) else None
    return None
