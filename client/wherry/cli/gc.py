"""`wherry gc`: collect garbage now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Format, FormatOption, show, show_one, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    format: FormatOption = Format.table,
) -> None:
    """Collect in every namespace, and tell what went."""

    async def work(client: Client) -> None:
        from wherry_shared.api.gc import Collections

        done = await client.bus.proxy(Collections).collect(dry_run=dry_run)
        if format is Format.json:
            show_one(done.model_dump(), format)
            return
        if dry_run:
            rows = [{"namespace": d.namespace, "type": d.resource.type, "id": d.resource.id} for d in done.dead]
            show(rows, ["namespace", "type", "id"], format)
        for type, count in sorted(done.removed.items()):
            print(f"{count} of {type} {'would go' if dry_run else 'removed'}")
        if not dry_run:
            print(f"{done.kept} kept; {done.seconds:.2f} s, changes waited {done.longest_wait * 1000:.0f} ms at most")

    with_client("default", work)
