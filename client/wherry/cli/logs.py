"""`wherry logs`: what a container wrote in the background, from anywhere on the bus."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client
    from wherry.logs import LogLine


def command(
    id: Annotated[str, typer.Argument(help="The container.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
    since: Annotated[str, typer.Option(help="10m, 2h, 3d, or an RFC 3339 time.")] = "",
    until: Annotated[str, typer.Option(help="10m, 2h, 3d, or an RFC 3339 time.")] = "",
    tail: Annotated[str, typer.Option("--tail", help="How many of the last lines, or all.")] = "all",
    timestamps: Annotated[bool, typer.Option("--timestamps", "-t", help="When each line was written.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    from wherry_shared.errors import InvalidArgument

    from .events import parse_since

    if tail != "all" and not tail.isdecimal():
        raise InvalidArgument(f"--tail {tail!r} is neither a number nor all")
    begin, end = (parse_since(text) if text else None for text in (since, until))

    async def work(client: Client) -> None:
        from wherry.container import find

        container = await find(client, id)
        printing = _Printing(timestamps)
        lines = container.logs(follow=follow, since=begin, until=end, tail=-1 if tail == "all" else int(tail))
        async for line in lines:
            printing.put(line)

    try:
        with_client(namespace, work)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing is flushed into it at the end


class _Printing:
    """Lines onto our own streams, whose parts go together again."""

    def __init__(self, timestamps: bool) -> None:
        self._timestamps = timestamps
        self._open = {"stdout": False, "stderr": False}

    def put(self, line: LogLine) -> None:
        out = sys.stdout.buffer if line.stream == "stdout" else sys.stderr.buffer
        head = f"{line.stamp} ".encode() if self._timestamps and not self._open.get(line.stream) else b""
        out.write(head + line.text + (b"" if line.partial else b"\n"))
        out.flush()
        self._open[line.stream] = line.partial
