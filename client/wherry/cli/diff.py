"""`wherry diff`: what a container changed, or how two images, snapshots or containers differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Format, FormatOption, NamespaceOption, clean, show, with_client

if TYPE_CHECKING:
    from wherry_shared.api.diff import Change

    from wherry import Client


def command(
    left: Annotated[str, typer.Argument(metavar="CONTAINER|A", help="A container, or the tree to start from.")],
    right: Annotated[str, typer.Argument(metavar="[B]", help="The tree to compare with it.")] = "",
    snapshotter: Annotated[str, typer.Option(help="Which snapshotter holds A and B.")] = "",
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    async def work(client: Client) -> list[Change]:
        from wherry import commit

        if not right:
            return await (await client.container(left)).changes()
        chosen = snapshotter or await client.default_snapshotter()
        async with commit.tree(client, left, chosen) as one, commit.tree(client, right, chosen) as other:
            return [change async for change in commit.changes(client, one, other)]

    found = with_client(namespace, work)
    if format is Format.json:
        show([change.model_dump() for change in found], ["kind", "path"], format)
        return
    for change in found:
        print(change.kind, clean(change.path))
