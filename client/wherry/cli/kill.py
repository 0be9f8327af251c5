"""`wherry kill`: a signal to a container's init, or to all of it."""

from __future__ import annotations

import signal as signals
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    ids: Annotated[list[str], typer.Argument(help="The containers.")],
    signal: Annotated[str, typer.Option("--signal", "-s", help="A name or a number.")] = "SIGKILL",
    all: Annotated[bool, typer.Option("--all", "-a", help="Every process of the container.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    number = parse_signal(signal)

    async def work(client: Client) -> None:
        for id in ids:
            await client.tasks.kill(id, number, "", all)
            print(id)

    with_client(namespace, work)


def parse_signal(text: str) -> int:
    """The number of `9`, `KILL` or `SIGKILL`. InvalidArgument otherwise."""
    from wherry_shared.errors import InvalidArgument

    if text.isdigit() and 1 <= int(text) <= 64:
        return int(text)
    name = text.upper() if text.upper().startswith("SIG") else f"SIG{text.upper()}"
    try:
        return int(signals.Signals[name])
    except KeyError:
        raise InvalidArgument(f"no signal {text!r}") from None
