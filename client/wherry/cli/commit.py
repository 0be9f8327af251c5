"""`wherry commit`: an image of what a container changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, clean, with_client

if TYPE_CHECKING:
    from wherry import Client, Image


def command(
    container: Annotated[str, typer.Argument(help="The container; it may run.")],
    name: Annotated[str, typer.Argument(help="The image's name: app:v2, host:5000/team/app:v2.")],
    pause: Annotated[bool, typer.Option(help="Pause the container meanwhile.")] = True,
    author: Annotated[str, typer.Option("--author", "-a", help="Who made it.")] = "",
    message: Annotated[str, typer.Option("--message", "-m", help="Why.")] = "",
    change: Annotated[
        list[str],
        typer.Option(
            "--change", "-c", help="CMD, ENTRYPOINT, ENV, WORKDIR, USER, LABEL, EXPOSE, VOLUME or STOPSIGNAL, as in a"
            " Dockerfile.",
        ),
    ] = [],  # noqa: B006
    compression: Annotated[str, typer.Option(help="Of the new layer: gzip, zstd or none.")] = "gzip",
    unpack: Annotated[bool, typer.Option(help="Make the image's snapshot too.")] = False,
    source_date_epoch: Annotated[
        int | None,
        typer.Option(envvar="SOURCE_DATE_EPOCH", help="Seconds since 1970 that stand for now: a build that repeats."),
    ] = None,
    namespace: NamespaceOption = "default",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the image's digest only.")] = False,
) -> None:  # fmt: skip
    async def work(client: Client) -> Image:
        return await (await client.container(container)).commit(
            name, author=author, message=message, changes=change, compression=compression, pause=pause, unpack=unpack,
            source_date_epoch=source_date_epoch,
        )  # fmt: skip

    image = with_client(namespace, work)
    print(image.target.digest if quiet else f"{clean(image.name)} {image.target.digest}")
