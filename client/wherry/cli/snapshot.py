"""`wherry snapshot`: the snapshots of a namespace."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Format, FormatOption, NamespaceOption, age, clean, show, show_one, size, with_client

if TYPE_CHECKING:
    from wherry_shared.api.snapshot import Info
    from wherry_shared.values import Mount

    from wherry import Client

app = typer.Typer(no_args_is_help=True, add_completion=False)
SnapshotterOption = Annotated[
    str, typer.Option(envvar="WHERRY_SNAPSHOTTER", help="Which snapshotter; the namespace's default if not given.")
]
LabelOption = Annotated[list[str], typer.Option("--label", "-l", metavar="KEY=VALUE", help="A label; repeatable.")]
ParentOption = Annotated[str, typer.Option(help="The committed snapshot to stand on.")]
LabelArgument = Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="An empty value removes the label.")]


def _act(namespace: str, snapshotter: str, work: Callable[[Client, str], Awaitable[None]]) -> None:
    """Connect, and work with the snapshotter that was named, or with the namespace's default."""

    async def chosen(client: Client) -> None:
        await work(client, snapshotter or await client.default_snapshotter())

    with_client(namespace, chosen)


async def _all(client: Client, snapshotter: str, filters: list[str]) -> list[Info]:
    from wherry.client import walk

    return await walk(client.snapshots.walk, filters, snapshotter=snapshotter)


@app.command("ls")
def ls(
    filters: Annotated[list[str], typer.Argument(help="containerd filters: kind==active")] = [],  # noqa: B006
    snapshotter: SnapshotterOption = "",
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    """List snapshots."""

    async def work(client: Client, chosen: str) -> None:
        rows = [{**i.model_dump(), "age": age(i.created_at)} for i in await _all(client, chosen, filters)]
        show(rows, ["name", "kind", "parent", "age"], format)

    _act(namespace, snapshotter, work)


@app.command("info")
@app.command("stat", hidden=True)
def info(
    key: str, snapshotter: SnapshotterOption = "", namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:  # fmt: skip
    """What is known of a snapshot."""

    async def work(client: Client, chosen: str) -> None:
        found = (await client.snapshots.stat(chosen, key)).model_dump()
        if format is Format.table:
            found["labels"] = " ".join(f"{k}={v}" for k, v in found["labels"].items())
        show_one(found, format)

    _act(namespace, snapshotter, work)


@app.command("tree")
def tree(snapshotter: SnapshotterOption = "", namespace: NamespaceOption = "default") -> None:
    """Show which snapshot stands on which."""

    async def work(client: Client, chosen: str) -> None:
        found = await _all(client, chosen, [])
        above: dict[str, list[Info]] = {}
        for each in found:
            above.setdefault(each.parent, []).append(each)
        open_ = [(each, 0) for each in reversed(above.get("", []))]
        while open_:
            each, depth = open_.pop()
            kind = "" if each.kind == "committed" else f"  ({each.kind})"
            print("  " * depth + clean(each.name) + kind)
            open_ += [(child, depth + 1) for child in reversed(above.get(each.name, []))]

    _act(namespace, snapshotter, work)


@app.command("usage")
def usage(
    keys: Annotated[list[str], typer.Argument(help="Which; all if none is named.")] = [],  # noqa: B006
    snapshotter: SnapshotterOption = "",
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    """What snapshots take by themselves, without their parents."""

    async def work(client: Client, chosen: str) -> None:
        from wherry_shared.errors import NotFound

        rows = []
        for key in keys or [i.name for i in await _all(client, chosen, [])]:
            try:
                used = await client.snapshots.usage(chosen, key)
            except NotFound:
                if keys:
                    raise
                continue  # it went since they were listed
            shown = used.size if format is Format.json else size(used.size)
            rows.append({"key": key, "size": shown, "inodes": used.inodes})
        if len(keys) == 1:
            show_one(rows[0], format)
        else:
            show(rows, ["key", "size", "inodes"], format)

    _act(namespace, snapshotter, work)


def _show_mounts(mounts: list[Mount], format: Format) -> None:
    rows = [m.model_dump() for m in mounts]
    shown = rows if format is Format.json else [{**m, "options": ",".join(m["options"])} for m in rows]
    show(shown, ["type", "source", "options"], format)


@app.command("mounts")
def mounts(
    key: str, snapshotter: SnapshotterOption = "", namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:  # fmt: skip
    """How an active snapshot would be mounted."""

    async def work(client: Client, chosen: str) -> None:
        _show_mounts(await client.snapshots.mounts(chosen, key), format)

    _act(namespace, snapshotter, work)


@app.command("prepare")
def prepare(
    key: str, parent: ParentOption = "", labels: LabelOption = [],  # noqa: B006
    snapshotter: SnapshotterOption = "", namespace: NamespaceOption = "default", format: FormatOption = Format.table,
) -> None:  # fmt: skip
    """Make an active snapshot, and show how it would be mounted."""

    async def work(client: Client, chosen: str) -> None:
        _show_mounts(await client.snapshots.prepare(chosen, key, parent, _kept(labels)), format)

    _act(namespace, snapshotter, work)


@app.command("view")
def view(
    key: str, parent: ParentOption = "", labels: LabelOption = [],  # noqa: B006
    snapshotter: SnapshotterOption = "", namespace: NamespaceOption = "default", format: FormatOption = Format.table,
) -> None:  # fmt: skip
    """Make a read-only snapshot, and show how it would be mounted."""

    async def work(client: Client, chosen: str) -> None:
        _show_mounts(await client.snapshots.view(chosen, key, parent, _kept(labels)), format)

    _act(namespace, snapshotter, work)


@app.command("commit")
def commit(
    name: str, key: str,
    parent: Annotated[str, typer.Option(help="Put it onto this parent, if it was prepared for that.")] = "",
    labels: LabelOption = [],  # noqa: B006
    snapshotter: SnapshotterOption = "", namespace: NamespaceOption = "default",
) -> None:  # fmt: skip
    """Turn the active snapshot KEY into the committed one NAME."""

    async def work(client: Client, chosen: str) -> None:
        print(clean((await client.snapshots.commit(chosen, name, key, parent, _kept(labels))).name))

    _act(namespace, snapshotter, work)


@app.command("label")
def label(
    key: str, labels: LabelArgument, snapshotter: SnapshotterOption = "", namespace: NamespaceOption = "default"
) -> None:
    """Change a snapshot's labels."""

    async def work(client: Client, chosen: str) -> None:
        new = _pairs(labels)
        await client.snapshots.update(chosen, key, new, [f"labels.{name}" for name in new])
        print(key)

    _act(namespace, snapshotter, work)


@app.command("rm")
def rm(keys: list[str], snapshotter: SnapshotterOption = "", namespace: NamespaceOption = "default") -> None:
    """Remove snapshots."""

    async def work(client: Client, chosen: str) -> None:
        for key in keys:
            await client.snapshots.remove(chosen, key)
            print(key)

    _act(namespace, snapshotter, work)


def _pairs(words: list[str]) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in words)


def _kept(words: list[str]) -> dict[str, str]:
    """The labels of what is made by hand: a collection spares it until it is removed."""
    return {"containerd.io/gc.root": datetime.now(UTC).isoformat(timespec="seconds"), **_pairs(words)}
