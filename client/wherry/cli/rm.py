"""`wherry rm`: containers, their snapshots, and with --force their running tasks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    ids: Annotated[list[str], typer.Argument(help="The containers.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Kill what runs.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    async def work(client: Client) -> None:
        from wherry_shared.errors import FailedPrecondition, NotFound

        for id in ids:
            container = await client.container(id)
            with contextlib.suppress(NotFound):
                state = await client.tasks.get(id)
                if state.status != "stopped" and not force:
                    raise FailedPrecondition(f"container {id} is {state.status}: kill it first, or use --force")
                await client.tasks.delete(id, "", force)
            await container.delete(snapshot=True)
            print(id)

    with_client(namespace, work)
