"""`wherry info`: the node, its services and its plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .common import Format, FormatOption, show, show_one, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(format: FormatOption = Format.table) -> None:
    async def work(client: Client) -> None:
        server = await client.introspection.server()
        services = await client.introspection.services()
        plugins = await client.introspection.plugins()
        rows: list[dict[str, Any]] = [s.model_dump() for s in services]
        extra = [p.model_dump() for p in plugins if p.type != "io.wherry.service.v1"]
        if format is Format.json:
            show_one({**server.model_dump(), "services": rows, "plugins": extra}, format)
            return
        show_one(server.model_dump(), format)
        print()
        show([{**r, "average": f"{r['average_ns'] / 1000:.0f} us"} for r in rows],
             ["name", "id", "version", "pid", "requests", "errors", "average"], format)  # fmt: skip
        if extra:
            print()
            show([{**p, "capabilities": " ".join(p["capabilities"])} for p in extra],
                 ["type", "id", "capabilities", "init_error"], format)  # fmt: skip

    with_client("default", work)
