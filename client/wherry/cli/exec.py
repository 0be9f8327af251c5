"""`wherry exec`: another process in a running container."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, fail, with_client

if TYPE_CHECKING:
    from wherry import Client

SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def command(
    id: Annotated[str, typer.Argument(help="The container.")],
    args: Annotated[list[str], typer.Argument(help="The command and its arguments.")],
    namespace: NamespaceOption = "default",
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Carry stdin.")] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")] = False,
    env: Annotated[list[str], typer.Option("--env", "-e", help="NAME=VALUE.")] = [],  # noqa: B006
    user: Annotated[str, typer.Option("--user", "-u", help="name|uid[:group|gid].")] = "",
    workdir: Annotated[str, typer.Option("--workdir", "-w", help="Where it starts.")] = "",
) -> None:
    async def work(client: Client) -> int:
        from wherry import Stdio

        from .terminal import raw_terminal

        task = await (await client.container(id)).task()
        stdin = sys.stdin.fileno() if interactive else None
        stdio = Stdio(stdin, sys.stdout.fileno(), None if tty else sys.stderr.fileno(), tty)
        process = await task.exec(args, stdio=stdio, user=user, cwd=workdir, env=env)
        try:
            with raw_terminal(process) if tty and interactive else contextlib.nullcontext():
                return (await process.wait()).code
        finally:
            await asyncio.shield(process.delete(force=True))

    from wherry_shared.errors import WherryError

    from .run import code_of, explain

    try:
        code = with_client(namespace, work)
    except WherryError as e:
        raise fail(explain(e, args), code_of(e)) from None
    raise typer.Exit(code)
