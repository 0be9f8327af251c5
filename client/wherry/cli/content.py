"""`wherry content`: the blobs of a namespace, and the ingests on their way."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Format, FormatOption, NamespaceOption, age, show, size, with_client

if TYPE_CHECKING:
    from wherry import Client

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.command("ls")
def ls(
    filters: Annotated[list[str], typer.Argument(help="containerd filters: size==123")] = [],  # noqa: B006
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    """List blobs."""

    async def work(client: Client) -> None:
        from wherry.client import walk

        rows = [
            {**i.model_dump(), "size": i.size if format is Format.json else size(i.size), "age": age(i.created_at)}
            for i in await walk(client.content.walk, filters)
        ]
        show(rows, ["digest", "size", "age"], format)

    with_client(namespace, work)


@app.command("get")
def get(digest: str, namespace: NamespaceOption = "default") -> None:
    """Write a blob to stdout."""

    async def work(client: Client) -> None:
        from wherry_shared.streams import read_blob

        async for chunk in read_blob(client.content, digest):
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()

    with_client(namespace, work)


@app.command("ingests")
def ingests(namespace: NamespaceOption = "default", format: FormatOption = Format.table) -> None:
    """List what is on its way."""

    async def work(client: Client) -> None:
        rows = [i.model_dump() for i in await client.content.statuses()]
        show(rows, ["ref", "offset", "total", "started_at"], format)

    with_client(namespace, work)


@app.command("rm")
def rm(digests: list[str], namespace: NamespaceOption = "default") -> None:
    """Forget blobs."""

    async def work(client: Client) -> None:
        for digest in digests:
            await client.content.delete(digest)
            print(digest)

    with_client(namespace, work)
