"""`wherry exec`: another process in a running container."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client
from .terminal import DETACH_KEYS

if TYPE_CHECKING:
    from wherry import Client, Process

SETTINGS = {"ignore_unknown_options": False, "allow_interspersed_args": False}


def command(
    id: Annotated[str, typer.Argument(help="The container.")],
    args: Annotated[list[str], typer.Argument(help="The command and its arguments.")],
    namespace: NamespaceOption = "default",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave it running.")] = False,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Carry stdin.")] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")] = False,
    env: Annotated[list[str], typer.Option("--env", "-e", help="NAME=VALUE, or NAME for ours.")] = [],  # noqa: B006
    env_file: Annotated[list[str], typer.Option(help="A file of NAME=VALUE lines.")] = [],  # noqa: B006
    user: Annotated[str, typer.Option("--user", "-u", help="name|uid[:group|gid].")] = "",
    workdir: Annotated[str, typer.Option("--workdir", "-w", help="Where it starts.")] = "",
    detach_keys: Annotated[str, typer.Option(help="What lets go of a terminal.")] = DETACH_KEYS,
    privileged: Annotated[bool, typer.Option("--privileged", help="Every capability (for admins).")] = False,
) -> None:
    from .create import guarded

    codes: list[int] = []

    async def work(client: Client) -> None:
        from wherry_shared.api.task import KEPT_MAX

        from wherry import Stdio, flags
        from wherry.container import find

        from .run import stdio_of

        task = await (await find(client, id)).task()
        stdio = Stdio(terminal=tty) if detach else stdio_of(interactive, tty, detach_keys)
        process = await task.exec(
            args, stdio=stdio, user=user, cwd=workdir, env=flags.environment(env_file, env), privileged=privileged,
            start=detach, kept=0 if detach else KEPT_MAX,
        )  # fmt: skip
        codes.append(0 if detach else await _foreground(process, raw=tty and interactive, terminal=tty))

    guarded(lambda: with_client(namespace, work), args)
    raise typer.Exit(codes[0])


async def _foreground(process: Process, *, raw: bool, terminal: bool) -> int:
    from .terminal import attended

    code: int | None = 0
    try:
        code = await attended(process, start=True, raw=raw, sized=terminal, signals=False)
        return 0 if code is None else code
    finally:
        if code is None:
            process.detach()  # it goes on
        else:
            await asyncio.shield(process.delete(force=True))
