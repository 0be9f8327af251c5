"""`wherry update`: change the limits of containers, running or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .common import with_client
from .create import LIMITS, NAMESPACE, accepting, argument, flag

if TYPE_CHECKING:
    from wherry import Client, Container


@accepting(
    argument("ids", "The containers.", list[str]),
    NAMESPACE,
    *LIMITS,
    flag("--restart", "no, always, unless-stopped or on-failure[:N]."),
)
def command(ids: list[str], namespace: str, **given: Any) -> None:
    async def work(client: Client) -> None:
        from wherry_shared.errors import InvalidArgument

        from wherry import flags, restarts

        from .kill import on_each

        resources, restart = flags.resources(given), given.get("restart", "")
        if restart:
            restarts.labels_for(restart)  # before anything is changed
        if not resources and not restart:
            raise InvalidArgument("nothing to change: no limit is given")

        async def one(container: Container) -> None:
            if resources:
                await container.update(resources)
            if restart:
                await container.keep(restart)

        await on_each(client, ids, one)

    with_client(namespace, work)
