"""`wherry pull`: a bar for each layer on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import NamespaceOption, clean, size, with_client

if TYPE_CHECKING:
    from wherry import Client
    from wherry.progress import OnProgress, Progress

SHOWN = {"downloading", "unpacking", "unpacked", "exists", "done"}


def command(
    reference: Annotated[str, typer.Argument(help="redis, docker.io/library/redis:alpine, host:5000/a@sha256:...")],
    namespace: NamespaceOption = "default",
    snapshotter: Annotated[str, typer.Option(help="Which snapshotter unpacks.")] = "",
    platform: Annotated[str, typer.Option(help="os/architecture[/variant]; this host's unless given.")] = "",
    unpack: Annotated[bool, typer.Option(help="Make the image's snapshots too.")] = True,
    insecure: Annotated[list[str], typer.Option(help="A host:port that may be spoken to in plain http.")] = [],  # noqa: B006
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the image's digest only.")] = False,
) -> None:
    async def work(client: Client) -> None:
        from wherry.registry.platforms import parse_platform

        wanted = parse_platform(platform) if platform else None
        with Bars(quiet=quiet) as bars:
            image = await client.pull(
                reference, unpack=unpack, snapshotter=snapshotter, platform=wanted, insecure=insecure,
                on_progress=bars.on_progress,
            )  # fmt: skip
        print(image.target.digest if quiet else f"{clean(image.name)} {image.target.digest}")

    with_client(namespace, work)


class Bars:
    """Shows a pull's progress on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.on_progress: OnProgress = _nothing
        self._live: Any = None
        if quiet:
            return
        if sys.stderr.isatty():
            self._start_live()
        else:
            self.on_progress = _Lines()

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn
        from rich.progress import Progress as Live

        live = Live(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
            TextColumn("{task.fields[step]}"), console=Console(stderr=True),
        )  # fmt: skip
        tasks: dict[str, object] = {}

        def on_progress(progress: Progress) -> None:
            if not progress.total:
                return
            known = tasks.get(progress.name)
            if known is None:
                known = tasks[progress.name] = live.add_task(_short(progress), total=progress.total, step="")
            if progress.step != "unpacking":
                live.update(known, completed=progress.offset, step=progress.step)  # type: ignore[arg-type]
            else:
                live.update(known, step=progress.step)  # type: ignore[arg-type]

        self._live = live
        self.on_progress = on_progress

    def __enter__(self) -> Bars:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()


class _Lines:
    """One line for each step of each blob."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def __call__(self, progress: Progress) -> None:
        key = (progress.name, progress.step)
        if progress.step in SHOWN and key not in self._told:
            self._told.add(key)
            total = f" {size(progress.total)}" if progress.total else ""
            print(f"{_short(progress)}: {progress.step}{total}", file=sys.stderr)


def _short(progress: Progress) -> str:
    name = progress.name.removeprefix("sha256:")[:12] if progress.name.startswith("sha256:") else progress.name
    return clean(f"{progress.kind or 'image'} {name}")


def _nothing(progress: Progress) -> None:
    return None
