"""`wherry import`: images out of an archive, from a file or from stdin."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, clean, labels_of, waiting_reads, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    archive: Annotated[str, typer.Argument(help="An OCI layout or `docker save` archive; - is stdin.")] = "-",
    namespace: NamespaceOption = "default",
    base_name: Annotated[str, typer.Option(help="The repository of bare tags; other repositories are left out.")] = "",
    digests: Annotated[bool, typer.Option("--digests", help="Name every image by its digest, too.")] = False,
    index_name: Annotated[str, typer.Option(help="A name for all of the archive's images as one index.")] = "",
    platform: Annotated[str, typer.Option(help="Only this platform: os/architecture[/variant].")] = "",
    all_platforms: Annotated[bool, typer.Option("--all-platforms", help="Refuse if any platform is missing.")] = False,
    label: Annotated[list[str], typer.Option(help="KEY=VALUE for the images.")] = [],  # noqa: B006
    unpack: Annotated[bool, typer.Option(help="Make the images' snapshots too.")] = True,
    snapshotter: Annotated[str, typer.Option(help="Which snapshotter unpacks.")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print names only.")] = False,
) -> None:
    async def work(client: Client) -> None:
        from wherry.registry.platforms import parse_platform

        source = waiting_reads(sys.stdin.fileno()) if archive == "-" else archive
        images = await client.import_images(
            source, base_name=base_name, digests=digests, index_name=index_name,
            platform=parse_platform(platform) if platform else None, all_platforms=all_platforms,
            labels=labels_of(label), unpack=unpack, snapshotter=snapshotter,
        )  # fmt: skip
        for image in images:
            print(clean(image.name) if quiet else f"{clean(image.name)} {image.target.digest}")

    if archive == "-" and sys.stdin.isatty():
        raise typer.BadParameter("stdin is a terminal: name an archive")
    with_client(namespace, work)
