"""`wherry images`: what can be run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Format, FormatOption, NamespaceOption, age, show, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    filters: Annotated[list[str], typer.Argument(help="containerd filters: name~=redis")] = [],  # noqa: B006
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only.")] = False,
) -> None:
    async def work(client: Client) -> None:
        from wherry.client import walk

        images = await walk(client.images.walk, filters)
        if quiet:
            for image in images:
                print(image.name)
            return
        rows = [
            {
                "name": image.name,
                "digest": image.target.digest if format is Format.json else image.target.digest[:19],
                "type": image.target.media_type,
                "age": age(image.created_at),
                "labels": image.labels,
            }
            for image in images
        ]
        show(rows, ["name", "digest", "type", "age"], format)

    with_client(namespace, work)
