"""`wherry restart`: stop containers and start them again."""

from __future__ import annotations

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
        from wherry_shared.api.task import REMOVE_LABEL, REMOVE_VALUES
        from wherry_shared.errors import FailedPrecondition

        from .kill import on_each
        from .start import start
        from .stop import stop

        async def one(container: Container) -> None:
            if container.record.labels.get(REMOVE_LABEL) in REMOVE_VALUES:
                raise FailedPrecondition(f"container {container.id} is removed when it stops (--rm)")
            await stop(container, seconds, signal)
            await start(container)

        await on_each(client, ids, one)

    with_client(namespace, work)
