"""`wherry images`: what can be run; without a verb of its own it lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .common import (
    Format,
    FormatOption,
    NamespaceOption,
    age,
    clean,
    fail,
    labels_of,
    show,
    show_one,
    size,
    with_client,
)

if TYPE_CHECKING:
    from wherry_shared.api.image import Image as Record

    from wherry import Client
    from wherry.usage import PlatformState, State, Summary


class Listing(TyperGroup):
    """`wherry images name~=redis` is `wherry images ls name~=redis`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in self.get_help_option_names(ctx)):
            args = ["ls", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=Listing, add_completion=False)
NamesArgument = Annotated[list[str], typer.Argument(help="The images.")]
FiltersArgument = Annotated[list[str], typer.Argument(help="containerd filters: name~=redis")]


@app.command("ls")
def ls(
    filters: FiltersArgument = [],  # noqa: B006
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only.")] = False,
) -> None:
    """List images; sizes are those of the packed content that is here."""

    async def work(client: Client) -> None:
        from wherry.client import walk
        from wherry.image import Image

        found = await walk(client.images.walk, filters)
        if quiet:
            for record in found:
                print(clean(record.name))
            return
        from wherry.usage import summaries

        rows = [_row(summary, format) for summary in await summaries(client, [Image(client, r) for r in found])]
        show(rows, ["name", "digest", "size", "platforms", "age"], format)

    with_client(namespace, work)


def _row(summary: Summary, format: Format) -> dict[str, Any]:
    from wherry.registry.platforms import describe

    record = summary.image.record
    platforms = [describe(platform) for platform in summary.platforms]
    plain = format is Format.json
    return {
        "name": record.name,
        "digest": record.target.digest if plain else record.target.digest[:19],
        "type": record.target.media_type,
        "size": summary.size if plain else size(summary.size),
        "platforms": platforms if plain else ",".join(platforms),
        "age": age(record.created_at),
        "created_at": record.created_at,
        "labels": record.labels,
    }


@app.command("rm")
def rm(
    names: NamesArgument,
    sync: Annotated[bool, typer.Option("--sync", help="Wait until what only they kept is collected.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    """Forget images; what only they kept is collected soon after."""

    async def work(client: Client) -> None:
        from wherry_shared.errors import InvalidArgument, NotFound

        failed = 0
        for i, name in enumerate(names):
            try:
                image = await client.image(name)
                await image.delete(sync=sync and i == len(names) - 1)
            except (InvalidArgument, NotFound) as e:
                failed += 1
                fail(str(e), 1)
            else:
                print(clean(image.name))
        if failed:
            raise typer.Exit(1)

    with_client(namespace, work)


@app.command("inspect")
def inspect(
    names: NamesArgument,
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.json,
) -> None:
    """Tell all about images: target, manifests, configs, what is missing, what they take."""

    async def work(client: Client) -> None:
        told = [await _inspect(client, name) for name in names]
        if format is Format.json:
            show(told, [], format)
            return
        for one in told:
            for platform in one.pop("platforms"):
                one[platform["platform"] or "image"] = f"{platform['digest']} {platform['status']}"
            show_one(one, format)

    with_client(namespace, work)


async def _inspect(client: Client, name: str) -> dict[str, Any]:
    image = await client.image(name)
    state, usage = await image.state(), await image.usage()
    return {
        **_record(image.record),
        "usage": {
            "content": usage.content, "unique": usage.unique, "manifests": usage.manifests,
            "snapshots": usage.snapshots,
        },
        "platforms": [_platform(own) for own in state.platforms],
        "absent": [child.digest for child in state.absent],
    }  # fmt: skip


def _record(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        "target": record.target.model_dump(mode="json", exclude_defaults=True),
        "labels": record.labels,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
    }


def _platform(own: PlatformState) -> dict[str, Any]:
    from dataclasses import asdict

    from wherry.registry.platforms import describe

    config = asdict(own.config) if own.config else None
    if config is not None:
        config.update(platform=own.config and own.config.platform.model_dump(exclude_defaults=True))
    return {
        "platform": describe(own.platform) if own.platform else "",
        "digest": own.manifest.digest,
        "size": own.size,
        "status": _status(own.missing),
        "missing": [part.descriptor.digest for part in own.missing],
        "unpacked": own.unpacked,
        "layers": [layer.model_dump(exclude_defaults=True) for layer in own.layers],
        "config": config,
    }


def _status(missing: Sequence[object]) -> str:
    return f"incomplete ({len(missing)} missing)" if missing else "complete"


@app.command("label")
def label(
    name: Annotated[str, typer.Argument(help="The image.")],
    labels: Annotated[list[str], typer.Argument(help="KEY=VALUE; an empty value removes the label.")],
    replace: Annotated[bool, typer.Option("--replace-all", help="Remove all other labels.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    """Change an image's labels."""

    async def work(client: Client) -> None:
        new = labels_of(labels)
        record = (await client.image(name)).record.model_copy(update={"labels": new})
        mask = ["labels"] if replace else [f"labels.{key}" for key in new]
        print(clean((await client.images.update(record, mask)).name))

    with_client(namespace, work)


@app.command("check")
def check(
    filters: FiltersArgument = [],  # noqa: B006
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names of complete images only.")] = False,
) -> None:
    """Tell whether images are complete and unpacked, and what is missing; exit with 1 unless all are complete."""

    async def work(client: Client) -> None:
        from wherry.client import walk
        from wherry.image import Image
        from wherry.usage import Inspect

        look = Inspect(client)
        rows = [await _check(look, Image(client, record)) for record in await walk(client.images.walk, filters)]
        if quiet:
            for row in rows:
                if row["status"] == "complete":
                    print(clean(row["name"]))
        elif format is Format.json:
            show(rows, [], format)
        else:
            shown = [{**row, "unpacked": ",".join(row["unpacked"]) or "no"} for row in rows]
            show(shown, ["name", "status", "size", "unpacked"], format)
            for row in rows:
                for digest in row["missing"]:
                    print(f"missing of {clean(row['name'])}: {digest}")
        if any(row["status"] != "complete" for row in rows):
            raise typer.Exit(1)

    with_client(namespace, work)


async def _check(look: Any, image: Any) -> dict[str, Any]:
    from wherry_shared.errors import WherryError

    try:
        state: State = await look.state(image)
    except WherryError as e:
        return {"name": image.name, "status": f"unreadable: {e}", "size": "", "missing": [], "unpacked": []}
    status = "complete" if state.complete else "incomplete"
    total = sum(own.size for own in state.platforms)
    missing = [part.descriptor.digest for part in state.missing]
    if not state.platforms:
        missing += [child.digest for child in state.absent]
    return {
        "name": image.name, "status": status, "size": size(total), "missing": missing, "unpacked": state.unpacked
    }  # fmt: skip
