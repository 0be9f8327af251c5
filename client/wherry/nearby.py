"""Whether the node is the host that we are on: its files, devices and processes can then be looked at directly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from wherry_shared.errors import Unimplemented
from wherry_shared.runtime import NODE_FILE

if TYPE_CHECKING:
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
