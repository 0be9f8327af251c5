"""`wherry run`: image to running process; the exit code is the process's own (125, 126, 127 as Docker has them)."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any

import typer

from .common import with_client
from .create import ARGS, FLAGS, IMAGE, NAMESPACE, NODE_FAILED, accepting, flag, guarded, make, switch
from .terminal import DETACH_KEYS

if TYPE_CHECKING:
    from wherry import Client, Container, Stdio, Task

SETTINGS = {"ignore_unknown_options": False, "allow_interspersed_args": False}
OWN = [
    switch("--rm", "Remove the container when it has ended."),
    switch("--detach -d", "Print the id and leave it running."),
    switch("--interactive -i", "Carry stdin."),
    flag("--detach-keys", "What lets go of a terminal.", DETACH_KEYS),
]


@accepting(IMAGE, ARGS, NAMESPACE, *OWN, *FLAGS)
def command(image: str, args: list[str] | None, namespace: str, **given: Any) -> None:
    codes: list[int] = []

    async def work(client: Client) -> None:
        codes.append(await _run(client, image, args or [], given))

    guarded(lambda: with_client(namespace, work), args or [])
    raise typer.Exit(codes[0])


async def _run(client: Client, reference: str, args: list[str], given: dict[str, Any]) -> int:
    from wherry_shared.api.task import REMOVE_LABEL
    from wherry_shared.errors import InvalidArgument

    detach, rm, interactive, terminal = (bool(given.get(name)) for name in ("detach", "rm", "interactive", "tty"))
    if rm and given.get("restart", "no") != "no":
        raise InvalidArgument("--rm with --restart: what is removed is not started again")
    if not detach and given.get("restart", "no") != "no":
        raise InvalidArgument("--restart without --detach: what is started again has other streams than these")
    if rm:
        # It may end when nobody is here any more: the node removes it then.
        when = "true" if detach or terminal else "later"
        given = {**given, "label": [*given.get("label", ()), f"{REMOVE_LABEL}={when}"]}
    if not detach:
        check_stdin(interactive, terminal)
    container = await make(client, reference, args, given)
    if not detach:
        keys = given.get("detach_keys", DETACH_KEYS)
        return await foreground(container, interactive=interactive, terminal=terminal, fresh=True, rm=rm, keys=keys)
    try:
        await container.start(stdin=interactive)
    except BaseException:
        await asyncio.shield(_leave(None, container, rm=True))
        raise
    print(container.id)
    return 0


async def foreground(
    container: Container, *, interactive: bool, terminal: bool, fresh: bool = False, rm: bool = False,
    keys: str = DETACH_KEYS,
) -> int:  # fmt: skip
    """Make its task with our stdio and wait; answers the exit code. The task is removed at the end, and with `rm` the
    container; with `fresh` also when it could not be started. At the detach keys everything is left as it is."""
    from .terminal import attended

    task: Task | None = None
    code: int | None = NODE_FAILED
    try:
        task = await container.new_task(stdio=stdio_of(interactive, terminal, keys))
        code = await attended(task, start=True, raw=terminal and interactive, sized=terminal)
        return 0 if code is None else code
    finally:
        started = task is not None and task.started
        if task is not None and code is None:
            task.detach()
        else:
            await asyncio.shield(_leave(task, container, rm=rm or (fresh and not started), force=rm or not started))


def terminal_of(container: Container) -> bool:
    """Whether its specification says that it has a terminal."""
    return bool(((container.record.spec or {}).get("process") or {}).get("terminal"))


async def _leave(task: Task | None, container: Container, *, rm: bool, force: bool = False) -> None:
    """Remove what shall not stay. What fails here has failed before, and that is told."""
    from wherry_shared.errors import WherryError

    remove = container.delete
    with contextlib.suppress(WherryError):
        if task is not None:
            await task.delete(force=force)
            remove = container.forget
    with contextlib.suppress(WherryError):
        if rm:
            await remove(snapshot=True)


def check_stdin(interactive: bool, terminal: bool) -> None:
    """InvalidArgument: a terminal is to be fed from something that is none. Nobody would tell it of that's end."""
    from wherry_shared.errors import InvalidArgument

    if interactive and terminal and not sys.stdin.isatty():
        raise InvalidArgument("-t with -i, and the input is no terminal: leave out -t")


def stdio_of(interactive: bool, terminal: bool, keys: str = DETACH_KEYS) -> Stdio:
    """Our own streams. A terminal's go over the bus, so that it can be left and joined again, and others can join."""
    from wherry import Stdio

    from .terminal import parse_keys

    check_stdin(interactive, terminal)
    stdin, stdout = sys.stdin.fileno() if interactive else None, sys.stdout.fileno()
    if not terminal:
        return Stdio(stdin, stdout, sys.stderr.fileno())
    return Stdio(stdin, stdout, None, terminal, remote=True, detach_keys=parse_keys(keys) if interactive else b"")
