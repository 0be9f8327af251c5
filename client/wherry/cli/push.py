"""`wherry push`: the same bars as for a pull."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, clean, with_client
from .pull import Bars, ForeignOption, HostsOption, InsecureOption, PasswordOption, QuietOption, UserOption, login

if TYPE_CHECKING:
    from wherry import Client


def command(
    name: Annotated[str, typer.Argument(help="The image here.")],
    target: Annotated[str, typer.Argument(help="Its name at the registry; its own unless given.")] = "",
    namespace: NamespaceOption = "default",
    platform: Annotated[list[str], typer.Option(help="Only these platforms; may be repeated.")] = [],  # noqa: B006
    foreign_layers: ForeignOption = False,
    referrers: Annotated[bool, typer.Option("--referrers", help="What refers to it and was pulled, too.")] = False,
    insecure: InsecureOption = [],  # noqa: B006
    hosts_dir: HostsOption = "",
    user: UserOption = "",
    password_stdin: PasswordOption = False,
    quiet: QuietOption = False,
) -> None:
    credentials = login(target or name, user, password_stdin=password_stdin)

    async def work(client: Client) -> None:
        from wherry.registry.platforms import parse_platform

        with Bars(quiet=quiet) as bars:
            pushed = await client.push(
                name, target, platform=[parse_platform(p) for p in platform], foreign_layers=foreign_layers,
                referrers=referrers, insecure=insecure, hosts_dir=hosts_dir, credentials=credentials,
                on_progress=bars.on_progress,
            )  # fmt: skip
        print(pushed.digest if quiet else f"{clean(target or name)} {pushed.digest}")

    with_client(namespace, work)
