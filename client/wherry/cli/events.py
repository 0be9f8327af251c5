"""`wherry events`: what happens, and with --since what happened."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Format, FormatOption, NamespaceOption, clean, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    since: Annotated[str, typer.Option(help="10m, 2h, 3d, or an RFC 3339 time.")] = "",
    filters: Annotated[list[str], typer.Option("--filter", help='containerd filters: topic~="^/tasks/"')] = [],  # noqa: B006
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of every namespace.")] = False,
    follow: Annotated[bool, typer.Option(help="Go on with what happens.")] = True,
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    start = parse_since(since) if since else None

    async def work(client: Client) -> None:
        events = client.watch(since=start, filters=filters, all_namespaces=all_namespaces, follow=follow)
        async for e in events:
            if format is Format.json:
                print(e.model_dump_json(), flush=True)
            else:
                stamp = e.timestamp.isoformat(timespec="milliseconds")
                print(clean(f"{stamp} {e.namespace} {e.topic} {json.dumps(e.event)}"), flush=True)

    with_client(namespace, work)


def parse_since(text: str) -> datetime:
    """A time ago (`10m`) or a time. InvalidArgument otherwise."""
    from wherry_shared.errors import InvalidArgument

    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if text[-1:] in units and text[:-1].isdigit():
        return datetime.now(UTC) - timedelta(seconds=int(text[:-1]) * units[text[-1]])
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(f"--since {text!r} is neither like 10m nor an RFC 3339 time") from None
    return at if at.tzinfo else at.astimezone()
