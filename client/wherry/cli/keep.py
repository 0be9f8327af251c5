"""`wherry keep`: who starts containers again on a node whose services are started one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from wherry_shared.errors import FailedPrecondition
from wherry_shared.runtime import NODE_FILE, default_node


def command(
    state: Annotated[Path, typer.Option(envvar="WHERRY_STATE", help="The node's state directory.")] = Path(
        "/run/wherry"
    ),
    node: Annotated[str, typer.Option(envvar="WHERRY_NODE", help="The node's name on the bus.")] = "",
    log_level: Annotated[str, typer.Option(envvar="WHERRY_LOG_LEVEL", help="What it tells on stderr.")] = "INFO",
) -> None:
    """Start containers again by their restart policies, until SIGTERM. One for a node; `wherry up` has its own."""
    from wherry.node.keeper import serve

    place = state.absolute() / "keeper"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
    except OSError as e:
        raise FailedPrecondition(f"{place} cannot be made: {e.strerror}") from None
    # The state directory is empty after a boot, and then alone.
    mark = place / "looked"
    named = "" if (state / NODE_FILE).exists() else node or default_node()
    serve(state.absolute(), log_level.upper(), boot=not mark.exists(), node=named, mark=mark)
