"""`wherry exec`: another process in a running container."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client

if TYPE_CHECKING:
    from wherry import Client, Process

SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


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
    privileged: Annotated[bool, typer.Option("--privileged", help="Every capability (for admins).")] = False,
) -> None:
    from .create import guarded

    codes: list[int] = []

    async def work(client: Client) -> None:
        from wherry import Stdio, flags
        from wherry.container import find

        task = await (await find(client, id)).task()
        stdin = sys.stdin.fileno() if interactive and not detach else None
        stdio = Stdio(stdin, sys.stdout.fileno(), None if tty else sys.stderr.fileno(), tty)
        if detach:
            stdio = Stdio(terminal=tty)
        process = await task.exec(
            args, stdio=stdio, user=user, cwd=workdir, env=flags.environment(env_file, env), privileged=privileged
        )
        codes.append(0 if detach else await _foreground(process, terminal=tty and interactive))

    guarded(lambda: with_client(namespace, work), args)
    raise typer.Exit(codes[0])


async def _foreground(process: Process, *, terminal: bool) -> int:
    from .terminal import raw_terminal

    try:
        with raw_terminal(process) if terminal else contextlib.nullcontext():
            return (await process.wait()).code
    finally:
        await asyncio.shield(process.delete(force=True))
