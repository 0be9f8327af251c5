"""`wherry wait`: wait until containers have ended, and print their exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    ids: Annotated[list[str], typer.Argument(help="The containers.")],
    namespace: NamespaceOption = "default",
) -> None:
    async def work(client: Client) -> None:
        import asyncio

        from wherry.container import find

        async def one(name: str) -> int:
            task = await (await find(client, name)).task()
            return (await task.wait()).code

        for code in await asyncio.gather(*(one(name) for name in ids)):
            print(code)

    with_client(namespace, work)
