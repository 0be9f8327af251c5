"""`wherry rm`: containers, their snapshots, and with --force their running tasks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client, Container

ATTEMPTS = 5  # to remove one that its policy has started meanwhile
ENDED = ("stopped", "created")


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
            for left in reversed(range(ATTEMPTS)):
                await end(container)
                try:
                    with contextlib.suppress(NotFound):  # it went by itself with its task (`run --rm`)
                        await container.delete(snapshot=True)
                    break
                except FailedPrecondition:  # its policy had it started between the two
                    if not (force and left):
                        raise
            if force and container.record.labels.get(POLICY):
                with contextlib.suppress(NotFound):  # it may just have been started again
                    await client.tasks.delete(container.id, "", True)

        async def end(container: Container) -> None:
            with contextlib.suppress(NotFound):
                if not force and (status := (await client.tasks.get(container.id)).status) not in ENDED:
                    raise FailedPrecondition(f"container {container.id} is {status}: kill it first, or use --force")
                await container.leave_stopped()
                await client.tasks.delete(container.id, "", force)

        await on_each(client, ids, remove)

    with_client(namespace, work)
