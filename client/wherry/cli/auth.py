"""`wherry auth`: credentials for the bus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)
StateOption = Annotated[Path, typer.Option(envvar="WHERRY_STATE", help="The node's state directory.")]


@app.command("tenant")
def tenant(namespace: str, state: StateOption = Path("/run/wherry")) -> None:
    """Make credentials that can do everything in one namespace and nothing outside it; print their file."""
    from wherry_shared.bus import credentials
    from wherry_shared.errors import Unavailable
    from wherry_shared.runtime import NODE_FILE

    try:
        node = json.loads((state / NODE_FILE).read_text())
    except (OSError, ValueError):
        raise Unavailable(f"no node runs on {state}") from None
    from wherry.node.server import reload_running

    credentials.issue(state / "creds", node["node"], [namespace])
    if "nats_pid" in node and not reload_running(node["nats_pid"], state / "nats.conf"):
        raise Unavailable(f"no node runs on {state}: it will know {namespace!r} when it is started")
    print(state / "creds" / f"{credentials.tenant(namespace)}.nk")


@app.command("init")
def init(
    directory: Annotated[Path, typer.Argument(help="Where the seeds and the server's user table go.")],
    node: Annotated[str, typer.Option(envvar="WHERRY_NODE", help="The node's name.")] = "",
    tenants: Annotated[list[str], typer.Option("--tenant", help="A namespace that gets a tenant.")] = [],  # noqa: B006
    leaves: Annotated[list[str], typer.Option("--leaf", help="A node whose server may join this one.")] = [],  # noqa: B006
    user: Annotated[str, typer.Option(help="Give each service its own folder; who runs those without root.")] = "",
    root: Annotated[Path | None, typer.Option(help="With --user: make the services' folders in this root.")] = None,
) -> None:
    """Make every user of a node whose services are started one by one; running it again adds what is missing."""
    from wherry_shared.bus import credentials
    from wherry_shared.runtime import default_node

    from wherry.node import handout

    credentials.issue(directory, node or default_node(), tenants, leaves)
    if user:
        handout.hand_out(directory, user, root)
    print(directory / credentials.NATS_USERS)
