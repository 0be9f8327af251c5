"""`wherry convert`: an image in another compression, for fewer platforms, or in OCI's types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, clean, with_client
from .pull import Bars

if TYPE_CHECKING:
    from wherry import Client


def command(
    name: Annotated[str, typer.Argument(help="The image.")],
    target: Annotated[str, typer.Argument(help="The name of what is made.")],
    compression: Annotated[str, typer.Option(help="gzip, zstd or none; as it is unless given.")] = "",
    level: Annotated[int, typer.Option(help="The compressor's level, 0 for the usual.")] = 0,
    oci: Annotated[bool, typer.Option("--oci", help="OCI's media types instead of docker's.")] = False,
    platform: Annotated[list[str], typer.Option(help="Only these: os/architecture[/variant].")] = [],  # noqa: B006
    namespace: NamespaceOption = "default",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the digest only.")] = False,
) -> None:
    async def work(client: Client) -> None:
        from wherry.registry.platforms import parse_platform

        with Bars(quiet=quiet) as bars:
            made = await client.convert(
                name, target, compression=compression, level=level, oci=oci,
                platforms=[parse_platform(p) for p in platform], on_progress=bars.on_progress,
            )  # fmt: skip
        print(made.target.digest if quiet else f"{clean(made.name)} {made.target.digest}")

    with_client(namespace, work)
