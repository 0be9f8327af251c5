"""`wherry export`: images as one archive, into a file or to stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import NamespaceOption, with_client
from .pull import ForeignOption

if TYPE_CHECKING:
    from wherry import Client


def command(
    archive: Annotated[str, typer.Argument(help="Where to; - is stdout.")],
    names: Annotated[list[str], typer.Argument(help="The images.")],
    namespace: NamespaceOption = "default",
    platform: Annotated[list[str], typer.Option(help="os/architecture[/variant]; the node's unless given.")] = [],  # noqa: B006
    all_platforms: Annotated[bool, typer.Option("--all-platforms", help="Everything that an index names.")] = False,
    docker: Annotated[bool, typer.Option(help="Add what `docker load` reads.")] = True,
    foreign_layers: ForeignOption = False,
) -> None:
    if archive == "-" and sys.stdout.isatty():
        raise typer.BadParameter("stdout is a terminal: name a file, or redirect")

    # Unbuffered: what a reader who went away did not take is not tried again at the end.
    target: Any = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer) if archive == "-" else archive

    async def work(client: Client) -> None:
        from wherry.registry.platforms import parse_platform

        await client.export_images(
            names, target, platforms=[parse_platform(p) for p in platform], all_platforms=all_platforms, docker=docker,
            foreign_layers=foreign_layers,
        )  # fmt: skip

    with_client(namespace, work)
