"""`wherry lease`: what is kept while work is under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Format, FormatOption, NamespaceOption, age, show, with_client

if TYPE_CHECKING:
    from wherry import Client

HOURS_MAX = 1_000_000
app = typer.Typer(no_args_is_help=True, add_completion=False)
TypeArgument = Annotated[str, typer.Argument(metavar="TYPE", help="content, ingests, images or snapshots/SNAPSHOTTER")]


@app.command("ls")
def ls(
    filters: Annotated[list[str], typer.Argument(help="containerd filters: id==pull")] = [],  # noqa: B006
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    """List leases."""

    async def work(client: Client) -> None:
        from wherry_shared.api.lease import EXPIRE_LABEL

        from wherry.client import walk

        rows = [
            {**i.model_dump(), "age": age(i.created_at), "expires": i.labels.get(EXPIRE_LABEL, "")}
            for i in await walk(client.leases.walk, filters)
        ]
        show(rows, ["id", "age", "expires"], format)

    with_client(namespace, work)


@app.command("create")
def create(
    id: Annotated[str, typer.Argument(help="One is made without.")] = "",
    hours: Annotated[float, typer.Option("--hours", help="Until it is void; 0: for ever.")] = 24.0,
    flat: Annotated[bool, typer.Option("--flat", help="Keep what is listed, and not what that names.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    """Make a lease and print its id."""

    async def work(client: Client) -> None:
        from datetime import timedelta

        from wherry_shared.api.lease import EXPIRE_LABEL
        from wherry_shared.errors import InvalidArgument
        from wherry_shared.values import now

        if not 0 <= hours <= HOURS_MAX:
            raise InvalidArgument(f"{hours} hours are not from 0 to {HOURS_MAX}")
        labels = {"containerd.io/gc.flat": "true"} if flat else {}
        if hours:
            labels[EXPIRE_LABEL] = (now() + timedelta(hours=hours)).isoformat(timespec="seconds")
        await client.ensure_namespace()
        print((await client.leases.create(id, labels)).id)

    with_client(namespace, work)


@app.command("delete")
def delete(
    ids: list[str],
    sync: Annotated[bool, typer.Option("--sync", help="Wait until what they kept is collected.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    """End leases."""

    async def work(client: Client) -> None:
        for id in ids:
            await client.leases.delete(id, sync=sync and id == ids[-1])
            print(id)

    with_client(namespace, work)


@app.command("add")
def add(lease: str, type: TypeArgument, id: str, namespace: NamespaceOption = "default") -> None:
    """Keep a thing, whether it exists yet or not."""

    async def work(client: Client) -> None:
        from wherry_shared.api.lease import Resource

        await client.leases.add_resource(lease, Resource(type=type, id=id))

    with_client(namespace, work)


@app.command("rm")
def rm(lease: str, type: TypeArgument, id: str, namespace: NamespaceOption = "default") -> None:
    """Keep a thing no longer."""

    async def work(client: Client) -> None:
        from wherry_shared.api.lease import Resource

        await client.leases.delete_resource(lease, Resource(type=type, id=id))

    with_client(namespace, work)


@app.command("resources")
def resources(lease: str, namespace: NamespaceOption = "default", format: FormatOption = Format.table) -> None:
    """List what a lease keeps."""

    async def work(client: Client) -> None:
        from wherry.client import walk

        rows = [r.model_dump() for r in await walk(client.leases.resources, id=lease)]
        show(rows, ["type", "id"], format)

    with_client(namespace, work)
