"""`wherry stop`: ask containers to end, and kill those that do not."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client, Container


def command(
    ids: Annotated[list[str], typer.Argument(help="The containers.")],
    seconds: Annotated[int, typer.Option("--time", "-t", help="How long to wait before it is killed; -1: ever.")] = 10,
    signal: Annotated[str, typer.Option("--signal", "-s", help="Instead of the container's own.")] = "",
    namespace: NamespaceOption = "default",
) -> None:
    async def work(client: Client) -> None:
        from .kill import on_each

        async def one(container: Container) -> None:
            await stop(container, seconds, signal)

        await on_each(client, ids, one)

    with_client(namespace, work)


async def stop(container: Container, seconds: float, signal: str = "") -> None:
    """End a container's task by its stop signal; what does not run is stopped already."""
    from wherry_shared.errors import NotFound

    from wherry.container import STOP_SIGNAL_LABEL

    from .kill import parse_signal

    number = parse_signal(signal or container.record.labels.get(STOP_SIGNAL_LABEL, "") or "SIGTERM")
    await container.leave_stopped()
    with contextlib.suppress(NotFound):
        task = await container.task()
        if (await task.state()).status != "stopped":
            await task.stop(number, seconds)
