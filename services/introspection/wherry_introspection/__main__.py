"""Wiring of the introspection service."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared.api.introspection import Introspection
from wherry_shared.runtime import Host, run

from .node import Node
from .service import IntrospectionService


async def build(host: Host) -> Introspection:
    """No settings of its own."""
    settings = host.settings
    root = settings.own_root
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    host.lock(root / "lock")
    node = Node.open(root / "uuid", settings.node, settings.root, settings.state)
    host.metadata["server"] = node.id
    return IntrospectionService(node, host.bus)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the service until it is told to stop."""
    run("introspection", build, arguments)


if __name__ == "__main__":
    main()
