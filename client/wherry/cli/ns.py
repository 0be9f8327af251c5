"""`wherry ns`: the namespaces of a node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Format, FormatOption, labels_of, show, with_client

if TYPE_CHECKING:
    from wherry import Client

app = typer.Typer(no_args_is_help=True, add_completion=False)
LabelArgument = Annotated[list[str], typer.Argument(help="KEY=VALUE; an empty value removes the label.")]


@app.command("ls")
def ls(
    filters: Annotated[list[str], typer.Argument(help="containerd filters: name~=k8s, labels.team==web")] = [],  # noqa: B006
    format: FormatOption = Format.table,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only.")] = False,
) -> None:
    """List namespaces."""

    async def work(client: Client) -> None:
        from wherry.client import walk

        found = await walk(client.namespaces.walk, filters)
        if quiet:
            for namespace in found:
                print(namespace.name)
        elif format is Format.json:
            show([n.model_dump() for n in found], [], format)
        else:
            rows = [{"name": n.name, "labels": " ".join(f"{k}={v}" for k, v in n.labels.items())} for n in found]
            show(rows, ["name", "labels"], format)

    with_client("default", work)


@app.command("create")
def create(name: str, labels: LabelArgument = []) -> None:  # noqa: B006
    """Make a namespace known."""

    async def work(client: Client) -> None:
        await client.namespaces.create(name, labels_of(labels))
        print(name)

    with_client("default", work)


@app.command("label")
def label(name: str, labels: LabelArgument) -> None:
    """Change a namespace's labels."""

    async def work(client: Client) -> None:
        new = labels_of(labels)
        await client.namespaces.update(name, new, [f"labels.{key}" for key in new])
        print(name)

    with_client("default", work)


@app.command("rm")
def rm(
    names: list[str],
    sync: Annotated[bool, typer.Option("--sync", help="Collect first what nothing in them keeps.")] = False,
) -> None:
    """Forget namespaces that are empty."""

    async def work(client: Client) -> None:
        from wherry.prune import collect

        for name in names:
            if sync:
                await collect(client.within(name))
            await client.namespaces.delete(name)
            print(name)

    with_client("default", work)
