"""`wherry info`: the node, its services, its plugins and its runtimes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Format, FormatOption, show, show_one, size, with_client

if TYPE_CHECKING:
    from wherry_shared.api.introspection import Plugin, Runtime

    from wherry import Client

SERVICES = ("name", "id", "package", "pid", "uptime", "requests", "errors", "average", "memory")


def command(
    runtimes: Annotated[
        bool, typer.Option("--runtimes", help="Ask the OCI runtimes for their versions and features, too.")
    ] = False,
    format: FormatOption = Format.table,
) -> None:
    async def work(client: Client) -> None:
        server = await client.introspection.server()
        services = await client.introspection.services()
        plugins = await client.introspection.plugins()
        rows: list[dict[str, Any]] = [s.model_dump() for s in services]
        told = [r.model_dump() for r in await _runtimes(client, plugins)] if runtimes else []
        if format is Format.json:
            extra = [p.model_dump() for p in plugins if p.type != "io.wherry.service.v1"]
            more = {"runtimes": told} if runtimes else {}
            show_one({**server.model_dump(), "services": rows, "plugins": extra, **more}, format)
            return
        show_one(server.model_dump(), format)
        print()
        show([_service(row) for row in rows], SERVICES, format)
        _print_plugins(plugins)
        if told:
            print()
            show(told, ["name", "version", "path"], format)

    with_client("default", work)


def _service(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row, "average": f"{row['average_ns'] / 1000:.0f} us", "uptime": f"{row['uptime']:.0f} s",
        "memory": size(row["pss"] or row["rss"]),
    }  # fmt: skip


def _print_plugins(plugins: list[Plugin]) -> None:
    """The services are above, but for those that do not answer."""
    shown = [p.model_dump() for p in plugins if p.type != "io.wherry.service.v1" or p.init_error]
    if shown:
        print()
        rows = [{**p, "capabilities": " ".join(p["capabilities"])} for p in shown]
        show(rows, ["type", "id", "capabilities", "init_error"], Format.table)


async def _runtimes(client: Client, plugins: list[Plugin]) -> list[Runtime]:
    """Those that can be asked."""
    from wherry_shared.errors import NotFound, Unavailable

    found = []
    for plugin in plugins:
        if plugin.type == "io.containerd.runtime.v2":
            try:
                found.append(await client.introspection.runtime(plugin.id))
            except (NotFound, Unavailable) as e:
                print(f"runtime {plugin.id}: {e}", file=sys.stderr)
    return found
