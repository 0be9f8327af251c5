"""`wherry unpause`: thaw every process of containers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client, Container


def command(
    ids: Annotated[list[str], typer.Argument(help="The containers.")],
    namespace: NamespaceOption = "default",
) -> None:
    async def work(client: Client) -> None:
        from .kill import on_each

        async def one(container: Container) -> None:
            await client.tasks.resume(container.id)

        await on_each(client, ids, one)

    with_client(namespace, work)
