"""`wherry run`: image to running process; the exit code is the process's own (125, 126, 127 as Docker has them)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from .common import with_client
from .create import ARGS, FLAGS, IMAGE, NAMESPACE, accepting, guarded, make, switch

if TYPE_CHECKING:
    from wherry import Client, Container, Stdio, Task

SETTINGS = {"ignore_unknown_options": False, "allow_interspersed_args": False}
OWN = [
    switch("--rm", "Remove the container when it has ended."),
    switch("--detach -d", "Print the id and leave it running."),
    switch("--interactive -i", "Carry stdin."),
]


@accepting(IMAGE, ARGS, NAMESPACE, *OWN, *FLAGS)
def command(image: str, args: list[str] | None, namespace: str, **given: Any) -> None:
    codes: list[int] = []

    async def work(client: Client) -> None:
        codes.append(await _run(client, image, args or [], given))

    guarded(lambda: with_client(namespace, work), args or [])
    raise typer.Exit(codes[0])


async def _run(client: Client, reference: str, args: list[str], given: dict[str, Any]) -> int:
    from wherry_shared.errors import InvalidArgument

    detach, rm, interactive, terminal = (bool(given.get(name)) for name in ("detach", "rm", "interactive", "tty"))
    if detach and rm:
        raise InvalidArgument("--rm with --detach: nobody would be there to remove the container")
    container = await make(client, reference, args, given)
    if not detach:
        return await foreground(container, interactive=interactive, terminal=terminal, fresh=True, rm=rm)
    try:
        await background(container)
    except BaseException:
        await asyncio.shield(_leave(None, container, rm=True))
        raise
    print(container.id)
    return 0


async def background(container: Container) -> None:
    """Make a container's task and start it; when it does not start, no task is left."""
    task = await container.new_task(stdio=_stdio(False, terminal_of(container), detach=True))
    try:
        await task.start()
    except BaseException:
        await asyncio.shield(task.delete(force=True))
        raise
    task.detach()


async def foreground(
    container: Container, *, interactive: bool, terminal: bool, fresh: bool = False, rm: bool = False
) -> int:
    """Make its task with our stdio and wait; answers the exit code. The task is removed at the end, and with `rm` the
    container; with `fresh` also when it could not be started."""
    task: Task | None = None
    started = False
    try:
        task = await container.new_task(stdio=_stdio(interactive, terminal))
        with _signals_to(task), _terminal_of(task, wanted=terminal and interactive):
            await task.start()
            started = True
            return (await task.wait()).code
    finally:
        await asyncio.shield(_leave(task, container, rm=rm or (fresh and not started), force=rm or not started))


def terminal_of(container: Container) -> bool:
    """Whether its specification says that it has a terminal."""
    return bool(((container.record.spec or {}).get("process") or {}).get("terminal"))


async def _leave(task: Task | None, container: Container, *, rm: bool, force: bool = False) -> None:
    """Remove what shall not stay. What fails here has failed before, and that is told."""
    from wherry_shared.errors import WherryError

    with contextlib.suppress(WherryError):
        if task is not None:
            await task.delete(force=force)
    with contextlib.suppress(WherryError):
        if rm:
            await container.delete(snapshot=True)


def _stdio(interactive: bool, terminal: bool, *, detach: bool = False) -> Stdio:
    from wherry import Stdio

    if detach:
        return Stdio(terminal=terminal)
    stdin = sys.stdin.fileno() if interactive else None
    return Stdio(stdin, sys.stdout.fileno(), None if terminal else sys.stderr.fileno(), terminal)


def _terminal_of(task: Task, *, wanted: bool) -> contextlib.AbstractContextManager[None]:
    from .terminal import raw_terminal

    return raw_terminal(task) if wanted else contextlib.nullcontext()


@contextlib.contextmanager
def _signals_to(task: Task) -> Iterator[None]:
    """The signals that this process gets go to the task; from the second interrupt on it is killed."""
    loop = asyncio.get_running_loop()
    passed_on: set[asyncio.Task[None]] = set()
    got: list[int] = []

    def pass_on(number: int) -> None:
        got.append(number)
        # The first process of a container gets only signals that it handles; whoever asks twice means it.
        if got.count(signal.SIGINT) + got.count(signal.SIGTERM) > 1:
            number = signal.SIGKILL
        sending = loop.create_task(_kill(task, number))
        passed_on.add(sending)
        sending.add_done_callback(passed_on.discard)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        loop.add_signal_handler(number, pass_on, number)
    yield


async def _kill(task: Task, number: int) -> None:
    from wherry_shared.errors import WherryError

    with contextlib.suppress(WherryError):
        await task.kill(number)
