"""The edge of the introspection service: the node, and what the others tell of themselves on the bus."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from typing import Any

from wherry_shared.api import contracts
from wherry_shared.api.introspection import EndpointStatus, Introspection, Plugin, Runtime, Server, ServiceStatus
from wherry_shared.bus import Bus, credentials, discovery
from wherry_shared.errors import NotFound
from wherry_shared.filters import compile_filters
from wherry_shared.runtime import package_version
from wherry_shared.values import now

from .node import Node
from .programs import Programs

SERVICE_PLUGIN, RUNTIME_PLUGIN = "io.wherry.service.v1", "io.containerd.runtime.v2"

# Services answer within a few milliseconds. Nobody knows how many processes there are (scaled services, other nodes on
# the same bus), so all of QUICK is waited; when a service of this node has not answered then, they are asked again.
QUICK, PATIENT = 0.15, 0.5


class IntrospectionService(Introspection):
    """Asks the bus, and keeps nothing of its answers."""

    def __init__(self, node: Node, bus: Bus) -> None:
        self._node = node
        self._bus = bus
        self._programs = Programs()

    async def server(self) -> Server:
        node = self._node
        return Server(
            id=node.id, node=node.name, version=package_version("wherry-introspection"), started_at=node.started_at,
            boot_id=node.boot_id, pid=os.getpid(), pid_namespace=node.pid_namespace, time=now(), root=str(node.root),
            state=str(node.state),
        )  # fmt: skip

    async def plugins(self, filters: list[str] = []) -> list[Plugin]:
        matches = compile_filters(filters)
        found = await self._plugins()
        return [found[k] for k in sorted(found) if matches(partial(_field, found[k]))]

    async def _plugins(self) -> dict[tuple[str, str], Plugin]:
        silent = {contract.service for contract in contracts()}
        found: dict[tuple[str, str], Plugin] = {}
        for answer in await self._ask("INFO"):
            silent.discard(answer["name"])
            for plugin in (_service(answer), *_plugins_of(answer)):
                found[plugin.type, plugin.id] = plugin
        for name in silent:
            found[SERVICE_PLUGIN, name] = _service({"name": name}, "it does not answer on the bus")
        return found

    async def runtime(self, name: str) -> Runtime:
        plugin = (await self._plugins()).get((RUNTIME_PLUGIN, name))
        if plugin is None or not plugin.exports.get("path"):
            raise NotFound(f"runtime {name!r} is none that the task service tells of")
        return await self._programs.describe(name, plugin.exports["path"])

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


def _service(answer: dict[str, Any], error: str = "") -> Plugin:
    """A service as a plugin, by its answer to INFO."""
    name, metadata = str(answer["name"]), _strings(answer.get("metadata"))
    exports = {key: metadata[key] for key in ("package", "metrics") if key in metadata}
    if "version" in answer:
        exports["version"] = str(answer["version"])
    requires = [f"{SERVICE_PLUGIN}.{called}" for called in credentials.CALLS.get(name, ())]
    return Plugin(type=SERVICE_PLUGIN, id=name, requires=requires, exports=exports, init_error=error)


def _plugins_of(answer: dict[str, Any]) -> list[Plugin]:
    try:
        return [Plugin.model_validate(p) for p in json.loads(answer.get("metadata", {}).get("plugins", "[]"))]
    except ValueError:  # pydantic's is one
        return []


def _field(plugin: Plugin, path: tuple[str, ...]) -> str | None:
    return {"type": plugin.type, "id": plugin.id}.get(path[0]) if len(path) == 1 else None


def _status(answer: dict[str, Any]) -> ServiceStatus:
    endpoints = [_endpoint(told) for told in answer.get("endpoints", [])]
    requests = sum(e.requests for e in endpoints)
    metadata, process = _strings(answer.get("metadata")), answer.get("process", {})
    codes: Counter[str] = Counter()
    for each in endpoints:
        codes.update(each.error_codes)
    return ServiceStatus(
        name=str(answer["name"]),
        id=str(answer.get("id", "")),
        version=str(answer.get("version", "")),
        package=metadata.get("package", ""),
        started_at=str(answer.get("started", "")),
        uptime=_since(str(answer.get("started", ""))),
        requests=requests,
        errors=sum(e.errors for e in endpoints),
        average_ns=sum(e.average_ns * e.requests for e in endpoints) // max(1, requests),
        error_codes=dict(codes),
        refused=_counts(process.get("refused")),
        endpoints=endpoints,
        rss=int(process.get("rss", 0)),
        pss=int(process.get("pss", 0)),
        pid=int(metadata.get("pid", 0)),
        metrics=metadata.get("metrics", ""),
    )


def _endpoint(told: dict[str, Any]) -> EndpointStatus:
    data = told.get("data")
    return EndpointStatus(
        name=str(told.get("name", "")),
        requests=int(told.get("num_requests", 0)),
        errors=int(told.get("num_errors", 0)),
        average_ns=int(told.get("average_processing_time", 0)),
        error_codes=_counts(data.get("errors") if isinstance(data, dict) else None),
    )


def _strings(told: Any) -> Mapping[str, str]:
    return {str(k): str(v) for k, v in told.items()} if isinstance(told, dict) else {}


def _counts(told: Any) -> dict[str, int]:
    return {str(k): int(v) for k, v in told.items()} if isinstance(told, dict) else {}


def _since(started: str) -> float:
    """Seconds since then; 0 for what is no time."""
    try:
        return max(0.0, (now() - datetime.fromisoformat(started)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
