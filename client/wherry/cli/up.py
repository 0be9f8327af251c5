"""`wherry up`: a node in the foreground."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from wherry_shared.bus.credentials import CALLS
from wherry_shared.errors import InvalidArgument, WherryError
from wherry_shared.runtime import default_node
from wherry_shared.values import check_identifier


def command(
    root: Annotated[Path, typer.Option(envvar="WHERRY_ROOT", help="What must survive a reboot.")] = Path(
        "/var/lib/wherry"
    ),
    state: Annotated[Path, typer.Option(envvar="WHERRY_STATE", help="What must not.")] = Path("/run/wherry"),
    node: Annotated[str, typer.Option(envvar="WHERRY_NODE", help="This node's name on the bus.")] = "",
    port: Annotated[int, typer.Option(help="nats-server's loopback port; 0 for any free one.")] = 0,
    nats: Annotated[str, typer.Option(envvar="WHERRY_NATS", help="A NATS server of your own instead (URLs).")] = "",
    scale: Annotated[list[str], typer.Option(help="Several processes of a service: content=3.")] = [],  # noqa: B006
    together: Annotated[
        str, typer.Option(help="Services that share a process, which saves memory: image,container; `all` that may.")
    ] = "",
    user: Annotated[str, typer.Option(help="Who runs the services that need no root.")] = "",
    log_level: Annotated[str, typer.Option(help="What the services tell on stderr.")] = "WARNING",
) -> None:
    """Run a node until Ctrl-C, which stops everything, containers too. SIGTERM lets the containers live."""
    from wherry.node.supervisor import Plan, Supervisor

    from .runner import serve

    if os.geteuid():
        print("wherry up: without root nothing is mounted here and no container runs", file=sys.stderr)
    try:
        plan = Plan(
            root=root.absolute(), state=state.absolute(), node=check_identifier(node or default_node(), "node"),
            port=port, nats=nats, scale=dict(_scale(item) for item in scale), together=_together(together), user=user,
            log_level=log_level.upper(),
        )  # fmt: skip
        code = Supervisor(plan, say=_say, beside={"cli": serve}).run()
    except (WherryError, OSError) as e:
        print(f"wherry up: {e}", file=sys.stderr)
        code = 1
    raise typer.Exit(code)


def _say(text: str) -> None:
    print(text, flush=True)


def _together(text: str) -> frozenset[str]:
    from wherry.node.supervisor import ALONE

    return frozenset(CALLS) - ALONE if text == "all" else frozenset(name for name in text.split(",") if name)


def _scale(item: str) -> tuple[str, int]:
    name, _, count = item.partition("=")
    if not count.isdigit() or not 1 <= int(count) <= 64:
        raise InvalidArgument(f"--scale {item!r} is not SERVICE=COUNT with a count of 1 to 64")
    return name, int(count)
