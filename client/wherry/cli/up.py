"""`wherry up`: a node in the foreground."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

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
    port: Annotated[int, typer.Option(help="nats-server's loopback port; 0 for that of before, or any free one.")] = 0,
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
            port=_port(port), nats=_addresses(nats), scale=dict(_scale(item) for item in scale),
            together=_together(together), user=user, log_level=log_level.upper(),
        )  # fmt: skip
        if plan.root == plan.state:
            raise InvalidArgument(f"--root and --state are both {root}: what must not survive a reboot lies apart")
        code = Supervisor(plan, say=_say, beside={"cli": serve}).run()
    except (WherryError, OSError) as e:
        print(f"wherry up: {e}", file=sys.stderr)
        code = 1
    raise typer.Exit(code)


def _say(text: str) -> None:
    print(text, flush=True)


def _addresses(text: str) -> str:
    """Here, because services that are given what can be none only end, and are started again for ever."""
    for each in text.split(",") if text else ():
        scheme, separator, rest = each.partition("://")
        try:
            good = scheme in ("nats", "tls") and bool(separator and urlsplit(f"//{rest}").hostname)
            good = good and urlsplit(f"//{rest}").port != 0
        except ValueError:
            good = False
        if not good:
            raise InvalidArgument(f"--nats {each!r} is not like nats://host:port")
    return text


def _port(port: int) -> int:
    if not 0 <= port < 1 << 16:
        raise InvalidArgument(f"--port {port} is not between 0 and 65535")
    return port


def _together(text: str) -> frozenset[str]:
    from wherry.node.supervisor import ALONE

    return frozenset(CALLS) - ALONE if text == "all" else frozenset(name for name in text.split(",") if name)


def _scale(item: str) -> tuple[str, int]:
    name, _, count = item.partition("=")
    if not count.isdigit() or not 1 <= int(count) <= 64:
        raise InvalidArgument(f"--scale {item!r} is not SERVICE=COUNT with a count of 1 to 64")
    return name, int(count)
