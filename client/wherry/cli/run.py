"""`wherry run`: image to running process; the exit code is the process's own (125, 126, 127 as Docker has them)."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import NamespaceOption, fail, with_client

if TYPE_CHECKING:
    from wherry import Client, Container, Image, Stdio, Task

SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}
# Docker's: the node failed; the command cannot be run; the command is not there.
NODE_FAILED, CANNOT_RUN, NOT_THERE = 125, 126, 127


def command(
    image: Annotated[str, typer.Argument(help="The image; it is pulled when it is not there.")],
    args: Annotated[list[str] | None, typer.Argument(help="The command and its arguments.")] = None,
    namespace: NamespaceOption = "default",
    id: Annotated[str, typer.Option("--name", help="The container's id.")] = "",
    rm: Annotated[bool, typer.Option("--rm", help="Remove the container when it has ended.")] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Print the id and leave it running.")] = False,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Carry stdin.")] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")] = False,
    env: Annotated[list[str], typer.Option("--env", "-e", help="NAME=VALUE.")] = [],  # noqa: B006
    user: Annotated[str, typer.Option("--user", "-u", help="name|uid[:group|gid].")] = "",
    workdir: Annotated[str, typer.Option("--workdir", "-w", help="Where it starts.")] = "",
    entrypoint: Annotated[str, typer.Option(help="Instead of the image's.")] = "",
    hostname: Annotated[str, typer.Option(help="The container's host name.")] = "",
    read_only: Annotated[bool, typer.Option("--read-only", help="A root filesystem that cannot be written.")] = False,
    net_host: Annotated[bool, typer.Option("--net-host", help="The host's network.")] = False,
    runtime: Annotated[str, typer.Option(help="crun, runc, or another OCI runtime.")] = "",
    snapshotter: Annotated[str, typer.Option(help="Which snapshotter holds its filesystem.")] = "",
    label: Annotated[list[str], typer.Option("--label", "-l", help="KEY=VALUE.")] = [],  # noqa: B006
) -> None:
    container_id = id or f"{_stem(image)}-{secrets.token_hex(3)}"
    options: dict[str, Any] = {
        "args": args or [], "env": env, "user": user, "cwd": workdir, "hostname": hostname, "read_only": read_only,
        "terminal": tty, "host_network": net_host, "entrypoint": [entrypoint] if entrypoint else None,
        "runtime": runtime, "snapshotter": snapshotter, "labels": dict(i.partition("=")[::2] for i in label),
    }  # fmt: skip

    async def work(client: Client) -> int:
        return await _run(client, image, container_id, options, detach=detach, rm=rm, interactive=interactive)

    from wherry_shared.errors import WherryError

    try:
        code = with_client(namespace, work)
    except WherryError as e:
        raise fail(explain(e, options["args"]), code_of(e)) from None
    raise typer.Exit(code)


def _stem(image: str) -> str:
    name = image.partition("@")[0].rpartition("/")[2].partition(":")[0]
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")[:40] or "container"


def code_of(e: Exception) -> int:
    """Docker's exit code for an error, by what the OCI runtimes say of a command that is not there or cannot be run."""
    text = str(e).lower()
    if "exec" not in text:
        return NODE_FAILED
    if "permission denied" in text:
        return CANNOT_RUN
    return NOT_THERE if "not found" in text or "no such file or directory" in text else NODE_FAILED


def explain(e: Exception, args: list[str]) -> str:
    """The error's text, with the command that it is about."""
    return f"{args[0]}: {e}" if args and code_of(e) != NODE_FAILED and args[0] not in str(e) else str(e)


async def _run(
    client: Client, reference: str, container_id: str, options: dict[str, Any], *, detach: bool, rm: bool,
    interactive: bool,
) -> int:  # fmt: skip
    image = await _image(client, reference, options["snapshotter"])
    container = await client.new_container(container_id, image, **options)
    try:
        task = await container.new_task(stdio=_stdio(detach, interactive, options["terminal"]))
    except BaseException:
        await asyncio.shield(container.delete(snapshot=True))
        raise
    if detach:
        try:
            await task.start()
        except BaseException:
            await asyncio.shield(_remove(task, container))
            raise
        task.detach()
        print(container_id)
        return 0
    try:
        return await _foreground(task, terminal=options["terminal"] and interactive)
    finally:
        if rm:
            await asyncio.shield(_remove(task, container))
        else:
            with contextlib.suppress(Exception):
                await asyncio.shield(task.delete())


async def _image(client: Client, reference: str, snapshotter: str) -> Image:
    """The image, pulled when it is not there."""
    from wherry_shared.errors import NotFound

    from .pull import Bars

    try:
        return await client.image(reference)
    except NotFound:
        with Bars() as bars:
            return await client.pull(reference, unpack=True, snapshotter=snapshotter, on_progress=bars.on_progress)


def _stdio(detach: bool, interactive: bool, terminal: bool) -> Stdio:
    from wherry import Stdio

    if detach:
        return Stdio.null()
    stdin = sys.stdin.fileno() if interactive else None
    return Stdio(stdin, sys.stdout.fileno(), None if terminal else sys.stderr.fileno(), terminal)


async def _foreground(task: Task, *, terminal: bool) -> int:
    """Start it and wait. The signals that this process gets go to it; from the second interrupt on it is killed."""
    from .terminal import raw_terminal

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
    with raw_terminal(task) if terminal else contextlib.nullcontext():
        await task.start()
        return (await task.wait()).code


async def _kill(task: Task, number: int) -> None:
    from wherry_shared.errors import WherryError

    with contextlib.suppress(WherryError):
        await task.kill(number)


async def _remove(task: Task, container: Container) -> None:
    from wherry_shared.errors import NotFound

    with contextlib.suppress(NotFound):
        await task.delete(force=True)
    with contextlib.suppress(NotFound):
        await container.delete(snapshot=True)
