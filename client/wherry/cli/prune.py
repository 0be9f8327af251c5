"""`wherry prune`: remove what nobody needs, after a look at what that is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Format, FormatOption, NamespaceOption, age, clean, fail, show, size, with_client

if TYPE_CHECKING:
    from wherry import Client
    from wherry.prune import Plan, Pruned


def command(
    all: Annotated[bool, typer.Option("--all", "-a", help="Every image name that no container was made by.")] = False,
    containers: Annotated[bool, typer.Option("--containers", help="Containers that do not run, too.")] = False,
    filters: Annotated[
        list[str], typer.Option("--filter", help="label=KEY[=VALUE], label!=KEY[=VALUE], until=24h or a time.")
    ] = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look only.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", "--force", "-f", help="Do not ask.")] = False,
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    """Images without a tag, or that point at nothing, and what nothing keeps; more only when asked for."""

    async def work(client: Client) -> None:
        from wherry.prune import Wanted, carry_out, parse_filters, plan

        labels, until = parse_filters(filters)
        made = await plan(client, Wanted(all, containers, labels, until))
        if dry_run or format is Format.table:
            _preview(made, format)
        if dry_run or made.empty:
            if made.empty and not dry_run and format is Format.json:
                _report(None, format)
            return
        if not yes:
            _ask()
        _report(await carry_out(client, made), format)

    with_client(namespace, work)


def _ask() -> None:
    if not sys.stdin.isatty():
        raise fail("nothing is removed: say --yes where nobody can be asked", 1)
    typer.confirm("Remove all this?", abort=True)


def _preview(made: Plan, format: Format) -> None:
    rows: list[dict[str, Any]] = [
        {"type": "image", "name": image.name, "age": age(image.created_at)} for image in made.images
    ]
    rows += [{"type": "container", "name": c.id, "age": age(c.created_at)} for c in made.containers]
    summary = {
        "images": [image.name for image in made.images],
        "containers": [container.id for container in made.containers],
        "blobs": len(made.garbage.blobs),
        "snapshots": len(made.garbage.snapshots),
        "size": made.size,
    }
    if format is Format.json:
        show([summary], [], format)
        return
    if made.empty:
        print("there is nothing to remove")
        return
    if rows:
        show(rows, ["type", "name", "age"], format)
    print(f"{len(made.garbage.blobs)} blobs and {len(made.garbage.snapshots)} snapshots go: {size(made.size)}")


def _report(done: Pruned | None, format: Format) -> None:
    images, containers, freed = (done.images, done.containers, done.freed) if done else ([], [], 0)
    if format is Format.json:
        show([{"images": images, "containers": containers, "freed": freed}], [], format)
        return
    for name in images:
        print(f"removed image {clean(name)}")
    for name in containers:
        print(f"removed container {clean(name)}")
    print(f"freed {size(freed)}")
