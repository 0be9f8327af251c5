"""`wherry content`: the blobs of a namespace, and the ingests on their way."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from .common import (
    Format,
    FormatOption,
    NamespaceOption,
    age,
    clean,
    fail,
    labels_of,
    show,
    show_one,
    size,
    waiting_reads,
    with_client,
)

if TYPE_CHECKING:
    from wherry_shared.api.content import Info
    from wherry_shared.streams import BlobWriter

    from wherry import Client

app = typer.Typer(no_args_is_help=True, add_completion=False)
LabelOption = Annotated[list[str], typer.Option("--label", "-l", metavar="KEY=VALUE", help="A label; repeatable.")]
LabelArgument = Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="An empty value removes the label.")]


@app.command("ls")
def ls(
    filters: Annotated[list[str], typer.Argument(help="containerd filters: size==123")] = [],  # noqa: B006
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Digests only.")] = False,
) -> None:
    """List blobs."""

    async def work(client: Client) -> None:
        from wherry.client import walk

        found = await walk(client.content.walk, filters)
        if quiet:
            for info in found:
                print(info.digest)
            return
        rows = [
            {**i.model_dump(), "size": i.size if format is Format.json else size(i.size), "age": age(i.created_at)}
            for i in found
        ]
        show(rows, ["digest", "size", "age"], format)

    with_client(namespace, work)


@app.command("info")
def info(digest: str, namespace: NamespaceOption = "default", format: FormatOption = Format.table) -> None:
    """Tell what is known of a blob."""
    with_client(namespace, lambda client: _show(client, digest, format))


async def _show(client: Client, digest: str, format: Format) -> None:
    found = (await client.content.info(digest)).model_dump()
    labels = found.pop("labels")
    shown = {**found, "labels": labels} if format is Format.json else {**found, **{f"  {k}": labels[k] for k in labels}}
    show_one(shown, format)


@app.command("get")
def get(
    digest: str,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of stdout.")] = None,
    namespace: NamespaceOption = "default",
) -> None:
    """Write a blob to stdout or a file. The digest is checked; a file that would be wrong is not left."""

    async def work(client: Client) -> None:
        from contextlib import aclosing

        from wherry_shared.streams import read_blob

        from wherry.archive.ends import Target, writing

        # Unbuffered: what a reader who went away did not take is not tried again at the end.
        target: Target = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer) if output is None else output.absolute()
        chunks = read_blob(client.content, digest, verify=True)
        async with aclosing(chunks), writing(target, f"blob {digest}") as write:
            async for chunk in chunks:
                await write(chunk)

    with_client(namespace, work)


@app.command("ingest")
def ingest(
    source: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="stdin without it, or for -.")] = None,
    digest: Annotated[str, typer.Option(help="What it must be, sha256:... or sha512:...")] = "",
    expected_size: Annotated[int, typer.Option("--size", help="How many bytes it must be.")] = 0,
    ref: Annotated[str, typer.Option(help="The ingest to begin or to go on with; one of its own without.")] = "",
    labels: LabelOption = [],  # noqa: B006
    namespace: NamespaceOption = "default",
) -> None:
    """Make a file or stdin a blob and print its digest.

    What is interrupted goes on where it was when it is given the same --ref and the same bytes again. A blob that no
    image, lease or label keeps is collected: -l containerd.io/gc.root=true keeps one by itself.
    """

    async def work(client: Client) -> None:
        from wherry_shared.errors import AlreadyExists
        from wherry_shared.files import os_errors

        given = labels_of(labels)
        await client.ensure_namespace()
        with os_errors(str(source or "stdin")):
            file = sys.stdin.buffer if source in (None, Path("-")) else source.open("rb")
        with file:
            try:
                print((await _ingest(client, ref, file, digest, expected_size, given)).digest)
            except AlreadyExists:
                if not digest:
                    raise
                print(digest)

    with_client(namespace, work)


def _own_ref() -> str:
    import secrets

    return f"ingest-{secrets.token_hex(8)}"


async def _ingest(
    client: Client, ref: str, file: BinaryIO, digest: str, expected_size: int, labels: dict[str, str]
) -> Info:
    import asyncio

    from wherry_shared.errors import FailedPrecondition, InvalidArgument
    from wherry_shared.streams import BlobWriter

    name = ref or (f"ingest-{digest}" if digest else _own_ref())
    async with BlobWriter(client.content, name, total=expected_size, expected=digest) as writer:
        try:
            if not writer.complete:
                await _fill(writer, file)
            return await writer.commit(expected_size, digest, labels)
        except BaseException as e:
            # Nobody knows a ref of ours to go on with; and wrong bytes are nothing to go on from.
            if not ref and (not digest or isinstance(e, FailedPrecondition | InvalidArgument)):
                await asyncio.shield(writer.abort())
            raise


async def _fill(writer: BlobWriter, file: BinaryIO) -> None:
    if file.seekable():
        await writer.copy_from(file)
        return
    skip = writer.offset
    async for data in waiting_reads(file.fileno()):
        await writer.write(data[skip:])
        skip = max(0, skip - len(data))


@app.command("ingests")
def ingests(
    filters: Annotated[list[str], typer.Argument(help="containerd filters: ref~=layer")] = [],  # noqa: B006
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    """List what is on its way."""

    async def work(client: Client) -> None:
        rows = [i.model_dump() for i in await client.content.statuses(filters)]
        show(rows, ["ref", "offset", "total", "durable", "started_at", "updated_at"], format)

    with_client(namespace, work)


app.command("active", help="The same as ingests.")(ingests)


@app.command("abort")
def abort(refs: list[str], namespace: NamespaceOption = "default") -> None:
    """Remove ingests and their bytes."""

    async def work(client: Client) -> None:
        for ref in refs:
            await client.content.abort(ref)
            print(clean(ref))

    with_client(namespace, work)


@app.command("label")
def label(
    digest: str,
    labels: LabelArgument,
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    """Set and remove labels of a blob."""

    async def work(client: Client) -> None:
        given = labels_of(labels)
        await client.content.update(digest, given, [f"labels.{key}" for key in given])
        await _show(client, digest, format)

    with_client(namespace, work)


@app.command("verify")
def verify(
    digests: Annotated[list[str], typer.Argument(metavar="[DIGEST]...")] = [],  # noqa: B006
    everything: Annotated[bool, typer.Option("--all", help="Every blob of the namespace.")] = False,
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    """Read blobs again and compare them with their digests. Ends with status 1 when one is rotten.

    Rotten bytes are put aside; a pull of the image, or any upload of the digest, heals the blob.
    """
    if bool(digests) is everything:
        raise typer.BadParameter("name blobs, or ask for --all")

    rows = with_client(namespace, lambda client: verified(client, digests))
    show(rows, ["digest", "state"], format)
    if rotten := sum(row["state"] != "ok" for row in rows):
        raise fail(f"{rotten} of {len(rows)} blobs are not what they were", 1)


async def verified(client: Client, digests: Sequence[str]) -> list[dict[str, str]]:
    """The state of these blobs; without any, of all that are still there when it is their turn."""
    from wherry_shared.errors import NotFound

    from wherry.client import walk

    rows = []
    for digest in digests or [found.digest for found in await walk(client.content.walk)]:
        try:
            rows.append({"digest": digest, "state": await _verify(client, digest)})
        except NotFound:
            if digests:
                raise
    return rows


async def _verify(client: Client, digest: str) -> str:
    from wherry_shared.errors import DataLoss

    try:
        await client.content.verify(digest)
    except DataLoss as e:
        return str(e)
    return "ok"


@app.command("rm")
def rm(digests: list[str], namespace: NamespaceOption = "default") -> None:
    """Forget blobs."""

    async def work(client: Client) -> None:
        for digest in digests:
            await client.content.delete(digest)
            print(digest)

    with_client(namespace, work)
