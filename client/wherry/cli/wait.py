"""`wherry wait`: wait until containers have ended, and print their exit codes; errors of others go to stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, explained, fail, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    ids: Annotated[list[str], typer.Argument(help="The containers.")],
    namespace: NamespaceOption = "default",
) -> None:
    async def work(client: Client) -> None:
        import asyncio

        from wherry_shared.errors import WherryError

        from wherry.container import find

        async def one(name: str) -> int:
            task = await (await find(client, name)).task()
            return (await task.wait()).code

        failed = False
        waits = [asyncio.ensure_future(one(name)) for name in ids]
        for name, wait in zip(ids, waits, strict=True):
            try:
                print(await wait, flush=True)
            except WherryError as e:
                fail(explained(name, e), 1)
                failed = True
        if failed:
            raise typer.Exit(1)

    with_client(namespace, work)
