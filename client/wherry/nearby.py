"""Whether the node is the host that we are on: its files, devices and processes can then be looked at directly."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

from wherry_shared.errors import Unavailable, Unimplemented
from wherry_shared.runtime import NODE_FILE

from .registry.platforms import default_platform, normalise

if TYPE_CHECKING:
    from wherry_shared.values import Platform

    from .client import Client


def is_here(client: Client) -> bool:
    """Whether the client's node runs on this host."""
    try:
        known = json.loads((client.address.state / NODE_FILE).read_text())
        return bool(known["node"] == client.address.node)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def require(client: Client, what: str) -> None:
    """Unimplemented when the node is elsewhere."""
    if not is_here(client):
        raise Unimplemented(f"{what} works on the node {client.address.node} only: it is not this host")


async def platform_of(client: Client) -> Platform:
    """The node's platform, as its plugins have it; this host's where the node is here or nobody can say."""
    if client.is_admin and not is_here(client):
        with contextlib.suppress(Unavailable):
            for plugin in await client.introspection.plugins():
                if plugin.platforms:
                    return normalise(plugin.platforms[0])
    return default_platform()
