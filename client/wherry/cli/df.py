"""`wherry df`: what takes how much space, and what of it would go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Format, FormatOption, show, size, with_client

if TYPE_CHECKING:
    from wherry import Client
    from wherry.spent import Kind

COLUMNS = ("namespace", "type", "count", "size", "garbage", "prunable")


def command(
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", envvar="WHERRY_NAMESPACE", help="Only this; all unless given.")
    ] = "",
    format: FormatOption = Format.table,
) -> None:
    """`garbage` is what a collection would remove now, `prunable` what `prune --all` would free, garbage included."""

    async def work(client: Client) -> None:
        from wherry.spent import Kind, on_disk, spent

        found = await spent(client, [namespace] if namespace else None)
        rows = [_row(own.namespace, kind, format) for own in found for kind in own.kinds()]
        if len(found) > 1:
            blobs = {digest for own in found for digest in own.counted.blobs}
            rows.append(_row("", Kind("content on disk", len(blobs), on_disk(found)), format))
        show(rows, COLUMNS, format)

    with_client(namespace or "default", work)


def _row(namespace: str, kind: Kind, format: Format) -> dict[str, Any]:
    def shown(count: int | None) -> Any:
        return count if format is Format.json else "" if count is None else size(count)

    return {
        "namespace": namespace, "type": kind.name, "count": kind.count, "size": shown(kind.size),
        "garbage": shown(kind.garbage), "prunable": shown(kind.prunable),
    }  # fmt: skip
