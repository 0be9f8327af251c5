"""`wherry stats`: what containers use, as a table that is drawn anew every second."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import NamespaceOption, size, with_client

if TYPE_CHECKING:
    from wherry_shared.api.task import MetricsV1, MetricsV2, Stats

    from wherry import Client

COLUMNS = ["id", "cpu", "memory", "limit", "share", "read", "written", "pids"]
_UNLIMITED = 1 << 60


def command(
    ids: Annotated[list[str] | None, typer.Argument(help="The containers; all that run, unless given.")] = None,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Once, over a second.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds from one table to the next.", min=0.1)] = 1.0,
    format: Annotated[str, typer.Option("--format", help="table, json or a template: {{.ID}} {{.CPU}}.")] = "table",
    namespace: NamespaceOption = "default",
) -> None:
    async def work(client: Client) -> None:
        import asyncio

        from wherry.container import find

        from .ps import render

        wanted = [(await find(client, name)).id for name in ids or []]
        before = await _all(client, wanted)
        while True:
            await asyncio.sleep(interval)
            now = await _all(client, wanted)
            if format == "table" and not no_stream and sys.stdout.isatty():
                print("\x1b[H\x1b[J", end="")
            render([row_of(stats, before.get(id)) for id, stats in sorted(now.items())], COLUMNS, format)
            sys.stdout.flush()
            if no_stream:
                return
            before = now

    with_client(namespace, work)


async def _all(client: Client, wanted: list[str]) -> dict[str, Stats]:
    found: dict[str, Stats] = {}
    after = ""
    while True:
        page = await client.tasks.stats(wanted, after)
        found |= {stats.container_id: stats for stats in page.items}
        after = page.next
        if not after:
            return found


def row_of(stats: Stats, before: Stats | None) -> dict[str, Any]:
    """What a container uses, in words and in numbers (`_bytes`); cpu in percent of one since the time before."""
    used = _v1(stats.v1) if stats.v1 else _v2(stats.v2) if stats.v2 else dict.fromkeys(_NUMBERS, 0)
    percent = 0.0
    if before is not None:
        earlier = _v1(before.v1) if before.v1 else _v2(before.v2) if before.v2 else used
        seconds = (stats.timestamp - before.timestamp).total_seconds()
        percent = max(0.0, (used["cpu"] - earlier["cpu"]) / 1e9 / seconds * 100) if seconds > 0 else 0.0
    memory, limit = used["memory"], used["limit"]
    limited = 0 < limit < _UNLIMITED
    row = {
        "id": stats.container_id, "cpu": f"{percent:.2f}%", "memory": size(memory),
        "limit": size(limit) if limited else "-", "share": f"{100 * memory / limit:.2f}%" if limited else "-",
        "read": size(used["read"]), "written": size(used["written"]), "pids": used["pids"],
        "cpu_percent": round(percent, 4), "memory_bytes": memory, "limit_bytes": limit if limited else 0,
        "read_bytes": used["read"], "written_bytes": used["written"], "cpu_nanoseconds": used["cpu"],
    }  # fmt: skip
    # It runs, and cannot be asked now: nothing that looks like a measurement.
    return {**row, **dict.fromkeys(COLUMNS[1:], "-"), "error": stats.error} if stats.error else row


_NUMBERS = ("cpu", "memory", "limit", "read", "written", "pids")


def _v1(found: MetricsV1) -> dict[str, int]:
    """Memory without the cache that can be given back, as Docker counts it."""
    moved = {"read": 0, "write": 0}
    for entry in found.blkio.io_service_bytes_recursive:
        if entry.op.lower() in moved:
            moved[entry.op.lower()] += entry.value
    memory = found.memory
    return {
        "cpu": found.cpu.usage.total, "memory": max(memory.usage.usage - memory.total_inactive_file, 0),
        "limit": memory.usage.limit, "read": moved["read"], "written": moved["write"], "pids": found.pids.current,
    }  # fmt: skip


def _v2(found: MetricsV2) -> dict[str, int]:
    memory = found.memory
    return {
        "cpu": found.cpu.usage_usec * 1000, "memory": max(memory.usage - memory.inactive_file, 0),
        "limit": memory.usage_limit, "read": sum(io.rbytes for io in found.io.usage),
        "written": sum(io.wbytes for io in found.io.usage), "pids": found.pids.current,
    }  # fmt: skip
