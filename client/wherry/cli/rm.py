"""`wherry rm`: containers, their snapshots, and with --force their running tasks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client, Container


def command(
    ids: Annotated[list[str], typer.Argument(help="The containers.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Kill what runs.")] = False,
    volumes: Annotated[bool, typer.Option("--volumes", "-v", help="Docker's; no volume is a container's own.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    async def work(client: Client) -> None:
        from wherry_shared.errors import FailedPrecondition, NotFound

        from wherry.restarts import POLICY

        from .kill import on_each

        async def remove(container: Container) -> None:
            with contextlib.suppress(NotFound):
                state = await client.tasks.get(container.id)
                if state.status not in ("stopped", "created") and not force:
                    raise FailedPrecondition(
                        f"container {container.id} is {state.status}: kill it first, or use --force"
                    )
                await container.leave_stopped()
                await client.tasks.delete(container.id, "", force)
            with contextlib.suppress(NotFound):  # it went by itself with its task (`run --rm`)
                await container.delete(snapshot=True)
            if force and container.record.labels.get(POLICY):
                with contextlib.suppress(NotFound):  # it may just have been started again
                    await client.tasks.delete(container.id, "", True)

        await on_each(client, ids, remove)

    with_client(namespace, work)
