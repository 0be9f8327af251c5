"""`wherry pull`: a bar for each layer on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import NamespaceOption, clean, size, with_client

if TYPE_CHECKING:
    from wherry import Client
    from wherry.progress import OnProgress, Progress
    from wherry.registry import CredentialSource

SHOWN = {"downloading", "unpacking", "unpacked", "exists", "uploading", "uploaded", "mounted", "done"}
PASSWORD_MAX = 64 << 10

InsecureOption = Annotated[
    list[str], typer.Option("--insecure", help="A host:port that may be spoken to in plain http.")
]
HostsOption = Annotated[
    str, typer.Option("--hosts-dir", envvar="WHERRY_CONFIG", help="Where mirrors and hosts are configured.")
]
UserOption = Annotated[str, typer.Option("--user", "-u", envvar="WHERRY_USER", help="The name at the registry.")]
PasswordOption = Annotated[
    bool, typer.Option("--password-stdin", help="Read its password from stdin; WHERRY_PASSWORD serves, too.")
]
ForeignOption = Annotated[bool, typer.Option("--foreign-layers", help="Layers that are not to be handed on, too.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the image's digest only.")]
PlatformsOption = Annotated[
    list[str], typer.Option("--platform", help="os/architecture[/variant]; may be repeated. The node's unless given.")
]


def command(
    reference: Annotated[str, typer.Argument(help="redis, docker.io/library/redis:alpine, host:5000/a@sha256:...")],
    namespace: NamespaceOption = "default",
    snapshotter: Annotated[str, typer.Option(help="Which snapshotter unpacks.")] = "",
    platform: PlatformsOption = [],  # noqa: B006
    all_platforms: Annotated[bool, typer.Option("--all-platforms", help="Every platform that there is.")] = False,
    all_metadata: Annotated[bool, typer.Option("--all-metadata", help="Other platforms' manifests, too.")] = False,
    referrers: Annotated[bool, typer.Option("--referrers", help="Signatures, SBOMs and the like, too.")] = False,
    unpack: Annotated[bool, typer.Option(help="Make the image's snapshots too.")] = True,
    discard_unpacked_layers: Annotated[
        bool, typer.Option("--discard-unpacked-layers", help="Do not keep layers once they are unpacked.")
    ] = False,
    foreign_layers: ForeignOption = False,
    insecure: InsecureOption = [],  # noqa: B006
    hosts_dir: HostsOption = "",
    user: UserOption = "",
    password_stdin: PasswordOption = False,
    quiet: QuietOption = False,
) -> None:
    credentials = login(reference, user, password_stdin=password_stdin)

    async def work(client: Client) -> None:
        from wherry.registry.platforms import parse_platform

        with Bars(quiet=quiet) as bars:
            image = await client.pull(
                reference, unpack=unpack, snapshotter=snapshotter, platform=[parse_platform(p) for p in platform],
                all_platforms=all_platforms, all_metadata=all_metadata, referrers=referrers,
                discard_unpacked_layers=discard_unpacked_layers, foreign_layers=foreign_layers, insecure=insecure,
                hosts_dir=hosts_dir, credentials=credentials, on_progress=bars.on_progress,
            )  # fmt: skip
        print(image.target.digest if quiet else f"{clean(image.name)} {image.target.digest}")

    with_client(namespace, work)


def login(reference: str, user: str, *, password_stdin: bool) -> CredentialSource | None:
    """The credentials given for the reference's registry, None for docker's. A password is never an argument:
    others could read it.
    """
    if not user:
        return None
    from wherry_shared.errors import InvalidArgument

    from wherry.registry import Reference
    from wherry.registry.credentials import Credentials, Given

    password = sys.stdin.read(PASSWORD_MAX).rstrip("\r\n") if password_stdin else os.environ.get("WHERRY_PASSWORD", "")
    if not password:
        raise InvalidArgument(f"there is no password for {user}: give it on stdin, or in WHERRY_PASSWORD")
    return Given(Credentials(user, password), Reference.parse(reference).registry)


class Bars:
    """Shows the progress of a pull or a push on stderr."""

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
