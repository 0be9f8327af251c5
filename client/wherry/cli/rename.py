"""`wherry rename`: give a container a name beside its id.

Decision: an id never changes, because tasks, cgroups, logs, snapshots and events of the past carry it. The name is
the label `wherry/name`; every verb takes either, and the id wins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    id: Annotated[str, typer.Argument(help="The container.")],
    name: Annotated[str, typer.Argument(help="Its new name; its id takes the name away.")],
    namespace: NamespaceOption = "default",
) -> None:
    async def work(client: Client) -> None:
        from wherry.container import find

        await (await find(client, id)).rename(name)

    with_client(namespace, work)
