"""`wherry ps`: containers, and what their tasks do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Format, FormatOption, NamespaceOption, age, show, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    all: Annotated[bool, typer.Option("--all", "-a", help="Also those that do not run.")] = False,
    filters: Annotated[list[str], typer.Option("--filter", help="containerd filters: id==web")] = [],  # noqa: B006
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Ids only.")] = False,
) -> None:
    async def work(client: Client) -> None:
        from wherry.client import walk

        tasks = {t.container_id: t for t in await walk(client.tasks.walk)}
        rows = []
        for container in await walk(client.containers.walk, filters):
            task = tasks.get(container.id)
            if task is None and not all:
                continue
            if task is not None and task.status == "stopped" and not all:
                continue
            rows.append(
                {
                    "id": container.id,
                    "image": container.image,
                    "status": _status(task.status, task.exit_status) if task else "no task",
                    "pid": task.pid if task and task.status != "stopped" else "",
                    "age": age(container.created_at),
                    "runtime": container.runtime.name,
                    "labels": container.labels,
                }
            )
        if quiet:
            for row in rows:
                print(row["id"])
        else:
            show(rows, ["id", "image", "status", "pid", "age", "runtime"], format)

    with_client(namespace, work)


def _status(status: str, code: int | None) -> str:
    return f"{status} ({code})" if code is not None else status
