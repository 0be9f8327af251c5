"""`wherry inspect`: everything that is known of containers, or of images; what is not there goes to stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import NamespaceOption, explained, fail, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    names: Annotated[list[str], typer.Argument(help="Containers, or images.")],
    namespace: NamespaceOption = "default",
    format: Annotated[str, typer.Option("--format", "-f", help="json, or a template: {{.id}}.")] = "json",
    kind: Annotated[str, typer.Option("--type", help="container or image; either, unless given.")] = "",
) -> None:
    async def work(client: Client) -> None:
        from wherry_shared.errors import NotFound

        from .ps import render

        found, missing = [], False
        for name in names:
            try:
                found.append(await _one(client, name, kind))
            except NotFound as e:
                fail(explained(name, e), 1)
                missing = True
        render(found, [], format)
        if missing:
            raise typer.Exit(1)

    with_client(namespace, work)


async def _one(client: Client, name: str, kind: str) -> dict[str, Any]:
    from wherry_shared.errors import InvalidArgument, NotFound

    from wherry.container import find

    if kind not in ("", "container", "image"):
        raise InvalidArgument(f"type {kind[:40]!r} is not container or image")
    try:
        if kind != "image":
            container = await find(client, name)
            return await _container(client, container.record.model_dump(), container.name)
    except NotFound:
        if kind:
            raise
    try:
        image = await client.image(name)
    except (NotFound, InvalidArgument):
        raise NotFound(f"no container or image {name!r}") from None
    return {"name": image.name, **(await client.images.get(image.name)).model_dump()}


async def _container(client: Client, record: dict[str, Any], name: str) -> dict[str, Any]:
    from wherry_shared.errors import NotFound

    try:
        task: dict[str, Any] | None = (await client.tasks.get(record["id"])).model_dump()
    except NotFound:
        task = None
    return {"id": record.pop("id"), "name": name, **record, "task": task}
