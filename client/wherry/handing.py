"""A process's specification on its way to the task service: in the request, or through content where it is too long."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from wherry_shared import context
from wherry_shared.api.task import PROCESS_MAX
from wherry_shared.contract import CONTAINERS_MAX, pack
from wherry_shared.errors import InvalidArgument, ResourceExhausted
from wherry_shared.streams import write_blob

if TYPE_CHECKING:
    from .client import Client

# What goes along with it, and the headers, have the rest of a message's 1 MiB.
INLINE_BYTES = 768 << 10
# The service has read it within a minute: where the client dies, its lease goes by itself.
LEASE_HOURS = 1.0


@asynccontextmanager
async def handed(client: Client, process: dict[str, Any]) -> AsyncIterator[tuple[dict[str, Any], str]]:
    """`process` and `digest` for `tasks.exec`; what was put into content for it is let go of at the end.

    InvalidArgument: something in it cannot be sent. ResourceExhausted: over PROCESS_MAX.
    """
    try:
        data = pack(process)
    except (TypeError, ValueError, OverflowError) as e:
        raise InvalidArgument(f"the process cannot be sent: {e}") from None
    if len(data) <= INLINE_BYTES and all(len(process.get(k) or ()) <= CONTAINERS_MAX for k in ("args", "env")):
        yield process, ""
        return
    if len(data) > PROCESS_MAX:
        raise ResourceExhausted(f"the process takes {len(data)} bytes, and at most {PROCESS_MAX} fit")
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    key = context.current().call_key
    with context.use(key=""):  # the caller's names the effect of `exec`, and not of what goes before it
        async with client.lease(LEASE_HOURS) as lease:
            await write_blob(client.content, f"process-{lease}", data, size=len(data), expected=digest)
            with context.use(key=key):
                yield {}, digest
