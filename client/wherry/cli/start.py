"""`wherry start`: start containers that were made or have ended; they keep their snapshot and specification."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client, Container


def command(
    ids: Annotated[list[str], typer.Argument(help="The containers.")],
    attach: Annotated[bool, typer.Option("--attach", "-a", help="Carry its output, and answer its exit code.")] = False,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Carry stdin.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    from .create import guarded

    codes: list[int] = []

    async def work(client: Client) -> None:
        from wherry_shared.errors import InvalidArgument

        from wherry.container import find

        from .kill import on_each

        if not (attach or interactive):
            await on_each(client, ids, start)
        elif len(ids) == 1:
            codes.append(await _attached(await find(client, ids[0]), interactive=interactive))
        else:
            raise InvalidArgument("only one container's output can be carried at once")

    if attach or interactive:
        guarded(lambda: with_client(namespace, work))
        raise typer.Exit(codes[0])
    with_client(namespace, work)


async def start(container: Container) -> None:
    """Start it in the background; one that runs is left as it is."""
    await container.start()


async def _attached(container: Container, *, interactive: bool) -> int:
    from wherry_shared.errors import FailedPrecondition, NotFound

    from .run import foreground, terminal_of

    with contextlib.suppress(NotFound):
        task = await container.task()
        if (await task.state()).status != "stopped":
            raise FailedPrecondition(f"container {container.id} has a task already: `attach` to it")
        await task.delete()
    return await foreground(container, interactive=interactive, terminal=terminal_of(container))
