"""`wherry kill`: a signal to a container's init, or to all of it."""

from __future__ import annotations

import signal as signals
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, explained, fail, with_client

if TYPE_CHECKING:
    from wherry import Client, Container


def command(
    ids: Annotated[list[str], typer.Argument(help="The containers.")],
    signal: Annotated[str, typer.Option("--signal", "-s", help="A name or a number.")] = "SIGKILL",
    all: Annotated[bool, typer.Option("--all", "-a", help="Every process of the container.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    number = parse_signal(signal)

    async def work(client: Client) -> None:
        async def kill(container: Container) -> None:
            if number in _MEANT:
                await container.leave_stopped()
            await client.tasks.kill(container.id, number, "", all)

        await on_each(client, ids, kill)

    with_client(namespace, work)


async def on_each(client: Client, names: list[str], work: Callable[[Container], Awaitable[None]]) -> None:
    """Do something with each container, all at once, and print those with which it went well; the others' errors go
    to stderr, and the exit code is then 1."""
    import asyncio

    from wherry_shared.errors import WherryError

    from wherry.container import find

    async def one(name: str) -> str:
        try:
            await work(await find(client, name))
        except WherryError as e:
            return explained(name, e)
        return ""

    said = await asyncio.gather(*(one(name) for name in names))
    for name, error in zip(names, said, strict=True):
        if error:
            fail(error, 1)
        else:
            print(name)
    if any(said):
        raise typer.Exit(1)


# Whoever sends one of these does not want it back.
_MEANT = (signals.SIGKILL, signals.SIGTERM)


def parse_signal(text: str) -> int:
    """The number of `9`, `KILL`, `SIGKILL` or `RTMIN+3`. InvalidArgument otherwise."""
    from wherry_shared.errors import InvalidArgument

    if text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 64:
        return int(text)
    name, plus, offset = text.upper().removeprefix("SIG").partition("+" if "+" in text else "-")
    try:
        number = int(signals.Signals[f"SIG{name}"])
        if plus and name in ("RTMIN", "RTMAX"):
            number += int(offset) if "+" in text else -int(offset)
        elif plus:
            raise ValueError(text)
        if signals.SIGRTMIN <= number <= signals.SIGRTMAX or not plus:
            return number
    except (KeyError, ValueError):
        pass
    raise InvalidArgument(f"no signal {text[:40]!r}") from None
