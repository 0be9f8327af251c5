"""The edge of the introspection service: the node, and what the others tell of themselves on the bus."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from wherry_shared.api import contracts
from wherry_shared.api.introspection import Introspection, Plugin, Server, ServiceStatus
from wherry_shared.bus import Bus, discovery
from wherry_shared.filters import compile_filters
from wherry_shared.runtime import package_version

from .node import Node

# Services answer within a few milliseconds. Nobody knows how many processes there are (scaled services, other nodes on
# the same bus), so all of QUICK is waited; when a service of this node has not answered then, they are asked again.
QUICK, PATIENT = 0.15, 0.5


class IntrospectionService(Introspection):
    """Asks the bus, keeps nothing: what does not answer is not there."""

    def __init__(self, node: Node, bus: Bus) -> None:
        self._node = node
        self._bus = bus

    async def server(self) -> Server:
        node = self._node
        return Server(
            id=node.id, node=node.name, version=package_version("wherry-introspection"), started_at=node.started_at,
            boot_id=node.boot_id,
        )  # fmt: skip

    async def plugins(self, filters: list[str] = []) -> list[Plugin]:
        matches = compile_filters(filters)
        found: dict[tuple[str, str], Plugin] = {}
        for answer in await self._ask("INFO"):
            version = str(answer.get("version", ""))
            own = Plugin(type="io.wherry.service.v1", id=str(answer["name"]), exports={"version": version})
            for plugin in [own, *_plugins_of(answer)]:
                found[plugin.type, plugin.id] = plugin
        return [found[k] for k in sorted(found) if matches(partial(_field, found[k]))]

    async def services(self) -> list[ServiceStatus]:
        return [_status(answer) for answer in await self._ask("STATS")]

    async def _ask(self, verb: str) -> list[dict[str, Any]]:
        services = {contract.service for contract in contracts()}
        answers: list[dict[str, Any]] = []
        for wait in (QUICK, PATIENT):
            answers = await discovery.ask_all(self._bus.transport, verb, wait=wait)
            answers = [a for a in answers if _node_of(a) == self._node.name]
            if services <= {a["name"] for a in answers}:
                break
        return answers


def _node_of(answer: dict[str, Any]) -> Any:
    """None for what is on the bus but none of Wherry's services."""
    metadata = answer.get("metadata")
    return metadata.get("node") if isinstance(metadata, dict) else None


def _plugins_of(answer: dict[str, Any]) -> list[Plugin]:
    try:
        return [Plugin.model_validate(p) for p in json.loads(answer.get("metadata", {}).get("plugins", "[]"))]
    except ValueError:  # pydantic's is one
        return []


def _field(plugin: Plugin, path: tuple[str, ...]) -> str | None:
    return {"type": plugin.type, "id": plugin.id}.get(path[0]) if len(path) == 1 else None


def _status(answer: dict[str, Any]) -> ServiceStatus:
    endpoints = answer.get("endpoints", [])
    requests = sum(int(e.get("num_requests", 0)) for e in endpoints)
    return ServiceStatus(
        name=str(answer["name"]),
        id=str(answer.get("id", "")),
        version=str(answer.get("version", "")),
        started_at=str(answer.get("started", "")),
        requests=requests,
        errors=sum(int(e.get("num_errors", 0)) for e in endpoints),
        average_ns=sum(int(e.get("processing_time", 0)) for e in endpoints) // max(1, requests),
        pid=int(answer.get("metadata", {}).get("pid", 0)),
    )
