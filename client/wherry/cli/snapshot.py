"""`wherry snapshot`: the snapshots of a namespace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Format, FormatOption, NamespaceOption, age, show, show_one, size, with_client

if TYPE_CHECKING:
    from wherry import Client

app = typer.Typer(no_args_is_help=True, add_completion=False)
SnapshotterOption = Annotated[str, typer.Option(help="Which snapshotter.")]


@app.command("ls")
def ls(
    filters: Annotated[list[str], typer.Argument(help="containerd filters: kind==active")] = [],  # noqa: B006
    snapshotter: SnapshotterOption = "overlay",
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    """List snapshots."""

    async def work(client: Client) -> None:
        from wherry.client import walk

        found = await walk(client.snapshots.walk, filters, snapshotter=snapshotter)
        rows = [{**i.model_dump(), "age": age(i.created_at)} for i in found]
        show(rows, ["name", "kind", "parent", "age"], format)

    with_client(namespace, work)


@app.command("usage")
def usage(
    key: str,
    snapshotter: SnapshotterOption = "overlay",
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    """What a snapshot takes by itself."""

    async def work(client: Client) -> None:
        used = await client.snapshots.usage(snapshotter, key)
        shown = used.size if format is Format.json else size(used.size)
        show_one({"key": key, "size": shown, "inodes": used.inodes}, format)

    with_client(namespace, work)


@app.command("mounts")
def mounts(
    key: str,
    snapshotter: SnapshotterOption = "overlay",
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    """How an active snapshot would be mounted."""

    async def work(client: Client) -> None:
        rows = [m.model_dump() for m in await client.snapshots.mounts(snapshotter, key)]
        shown = rows if format is Format.json else [{**m, "options": ",".join(m["options"])} for m in rows]
        show(shown, ["type", "source", "options"], format)

    with_client(namespace, work)


@app.command("rm")
def rm(keys: list[str], snapshotter: SnapshotterOption = "overlay", namespace: NamespaceOption = "default") -> None:
    """Remove snapshots."""

    async def work(client: Client) -> None:
        for key in keys:
            await client.snapshots.remove(snapshotter, key)
            print(key)

    with_client(namespace, work)
