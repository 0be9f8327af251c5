"""`wherry df`: what takes how much space, and what of it would go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Format, FormatOption, show, size, with_client

if TYPE_CHECKING:
    from wherry import Client
    from wherry.spent import Spent

COLUMNS = ("namespace", "type", "count", "size", "reclaimable")


def command(
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", envvar="WHERRY_NAMESPACE", help="Only this; all unless given.")
    ] = "",
    format: FormatOption = Format.table,
) -> None:
    async def work(client: Client) -> None:
        from wherry.spent import spent

        found = await spent(client, [namespace] if namespace else None)
        rows = [row for own in found for row in _rows(own, format)]
        show(rows, COLUMNS, format)

    with_client(namespace or "default", work)


def _rows(own: Spent, format: Format) -> list[dict[str, Any]]:
    """A row a kind. Of images reclaimable is what `prune --all` would free of content; of content what a collection
    would; bytes that are the records' alone are not counted."""

    def shown(count: int | None) -> Any:
        return count if format is Format.json else "" if count is None else size(count)

    return [
        {"namespace": own.namespace, "type": kind, "count": count, "size": shown(taken), "reclaimable": shown(free)}
        for kind, count, taken, free in own.kinds()
    ]
