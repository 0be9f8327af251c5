"""`wherry attach`: join the streams of a running container, from anywhere on the bus; several may at once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, with_client
from .terminal import DETACH_KEYS

if TYPE_CHECKING:
    from wherry import Client


def command(
    id: Annotated[str, typer.Argument(help="The container.")],
    stdin: Annotated[bool, typer.Option("--stdin/--no-stdin", help="Carry stdin.")] = True,
    sig_proxy: Annotated[bool, typer.Option("--sig-proxy/--no-sig-proxy", help="Pass our signals on.")] = True,
    detach_keys: Annotated[str, typer.Option(help="What lets go of a terminal.")] = DETACH_KEYS,
    namespace: NamespaceOption = "default",
) -> None:
    from .create import guarded

    codes: list[int] = []

    async def work(client: Client) -> None:
        codes.append(await _attach(client, id, stdin=stdin, signals=sig_proxy, keys=detach_keys))

    guarded(lambda: with_client(namespace, work))
    raise typer.Exit(codes[0])


async def _attach(client: Client, id: str, *, stdin: bool, signals: bool, keys: str) -> int:
    from wherry_shared.errors import FailedPrecondition

    from wherry import Stdio
    from wherry.container import find

    from .terminal import attended, parse_keys

    task = await (await find(client, id)).task()
    state = await task.state()
    if state.status not in ("created", "running"):
        raise FailedPrecondition(f"cannot attach to a {state.status} container: {id}")
    terminal, interactive = state.stdio.terminal, stdin and bool(state.stdio.stdin)
    ours = sys.stdin.fileno() if interactive else None
    stderr = None if terminal else sys.stderr.fileno()
    typed = parse_keys(keys) if terminal and interactive else b""
    await task.attach(Stdio(ours, sys.stdout.fileno(), stderr, terminal, detach_keys=typed))
    try:
        code = await attended(task, raw=terminal and interactive, sized=terminal, signals=signals and not terminal)
    finally:
        task.detach()
    return 0 if code is None else code
