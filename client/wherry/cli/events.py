"""`wherry events`: what happens, and with --since what happened."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Format, FormatOption, NamespaceOption, clean, with_client

if TYPE_CHECKING:
    from wherry_shared.api.events import Envelope

    from wherry import Client, Watch


def command(
    since: Annotated[str, typer.Option(help="10m, 2h, 3d, or an RFC 3339 time.")] = "",
    until: Annotated[str, typer.Option(help="The same: no event from then on.")] = "",
    filters: Annotated[list[str], typer.Option("--filter", help='containerd filters: topic~="^/tasks/"')] = [],  # noqa: B006
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of every namespace.")] = False,
    follow: Annotated[bool, typer.Option(help="Go on with what happens.")] = True,
    place: Annotated[
        Path | None, typer.Option("--place-file", help="Go on after the last event printed; its place is kept here.")
    ] = None,
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    start = parse_since(since) if since else None
    end = parse_since(until, "--until") if until else None
    token = ""
    if place is not None:
        with suppress(FileNotFoundError):
            token = place.read_text().strip()

    async def work(client: Client) -> None:
        watch = client.watch(
            since=start, until=end, token=token, filters=filters, all_namespaces=all_namespaces, follow=follow
        )
        async with watch:
            await _print_all(watch, place, format)

    with_client(namespace, work)


async def _print_all(watch: Watch, place: Path | None, format: Format) -> None:
    from wherry import Gap

    while True:
        try:
            envelope = await anext(watch)
        except StopAsyncIteration:
            return
        except Gap as gap:
            print(
                json.dumps({"gap": gap.message}) if format is Format.json else f"-- gap: {gap.message} --", flush=True
            )
            continue
        _print(envelope, format)
        if place is not None:
            _write(place, watch.token)


def _print(e: Envelope, format: Format) -> None:
    if format is Format.json:
        print(e.model_dump_json(), flush=True)
    else:
        stamp = e.timestamp.isoformat(timespec="milliseconds")
        print(clean(f"{stamp} {e.namespace} {e.topic} {json.dumps(e.event)}"), flush=True)


def _write(place: Path, token: str) -> None:
    """Whole or not at all: half a place would be none."""
    new = place.with_name(place.name + ".new")
    new.write_text(token + "\n")
    os.replace(new, place)


def parse_since(text: str, option: str = "--since") -> datetime:
    """A time ago (`10m`) or a time. InvalidArgument otherwise."""
    from wherry_shared.errors import InvalidArgument

    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        if text[-1:] in units and text[:-1].isdigit():
            return datetime.now(UTC) - timedelta(seconds=int(text[:-1]) * units[text[-1]])
        return datetime.fromisoformat(text).astimezone(UTC)  # a time without a zone is this host's
    except (ValueError, OverflowError):
        raise InvalidArgument(f"{option} {text!r} is neither like 10m nor an RFC 3339 time") from None
