"""`wherry start`: start containers that were made or have ended; they keep their snapshot and specification."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client, Container, Task


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
    from .run import background

    task = await _standing(container)
    if task is None:
        await background(container)
    elif (await task.state()).status == "created":
        await task.start()


async def _standing(container: Container) -> Task | None:
    """Its task, when it has one that has not ended; what is left of one that has is removed."""
    from wherry_shared.errors import NotFound

    from wherry.flags import RESTART_STATUS

    from .stop import STOPPED_LABEL

    if container.record.labels.get(RESTART_STATUS) and container.record.labels.get(STOPPED_LABEL):
        await container.label({STOPPED_LABEL: ""})
    with contextlib.suppress(NotFound):
        task = await container.task()
        if (await task.state()).status != "stopped":
            return task
        await task.delete()
    return None


async def _attached(container: Container, *, interactive: bool) -> int:
    from wherry_shared.errors import FailedPrecondition

    from .run import foreground, terminal_of

    if await _standing(container) is not None:
        raise FailedPrecondition(f"container {container.id} has a task already: `attach` to it")
    return await foreground(container, interactive=interactive, terminal=terminal_of(container))
