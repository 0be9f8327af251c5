"""`wherry tag`: more names for an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, clean, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    name: Annotated[str, typer.Argument(help="The image.")],
    names: Annotated[list[str], typer.Argument(help="Its new names.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Take names away from other images.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    async def work(client: Client) -> None:
        image = await client.image(name)
        for new in names:
            print(clean((await image.tag(new, force=force)).name))

    with_client(namespace, work)
