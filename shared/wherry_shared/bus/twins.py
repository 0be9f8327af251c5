"""Two nodes of one name on one bus: requests would go now to the one, now to the other. docs/decisions/0032."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..boot import boot_id
from ..errors import FailedPrecondition, WherryError
from . import discovery
from .transport import Transport

HOME, SERVER = "home", "server"
"""What a service's card says of where it is at home, and introspection's of the node's id."""
ANSWER_SECONDS = 0.25
NAMED_MAX = 2


def home_of(root: Path) -> str:
    """What only processes on one directory of one running machine have in common; "" where there is none."""
    try:
        info = root.stat()
    except OSError:
        return ""
    return f"{boot_id()}:{info.st_dev:x}:{info.st_ino:x}"


def home(answer: dict[str, Any]) -> str:
    """Where who answered is at home; "" where it does not say."""
    return _metadata(answer, HOME)


async def refuse_twin(transport: Transport, node: str, service: str, home: str) -> None:
    """FailedPrecondition when another node of this name serves `service`. Where that cannot be asked, nothing."""
    if not home:
        return
    try:
        await transport.request(f"$SRV.PING.{service}", b"", timeout=ANSWER_SECONDS)
    except WherryError:
        return  # nobody does
    answers = await discovery.ask_all(transport, f"PING.{service}", wait=ANSWER_SECONDS)
    twins = strangers(answers, node, {service: home})
    if twins:
        if service != "introspection":
            answers = await discovery.ask_all(transport, "PING.introspection", wait=ANSWER_SECONDS)
        raise refusal(node, twins, answers)


def strangers(answers: Iterable[dict[str, Any]], node: str, homes: dict[str, str]) -> list[dict[str, Any]]:
    """Which of the answers are of a node of this name, and not from these homes of its services."""
    return [
        answer
        for answer in answers
        if _metadata(answer, "node") == node and home(answer) and home(answer) != homes.get(str(answer["name"]))
    ]


def refusal(node: str, twins: list[dict[str, Any]], answers: Iterable[dict[str, Any]]) -> FailedPrecondition:
    """What to say of twins. answers: those among which their introspection services' are."""
    boots = {home(twin).partition(":")[0] for twin in twins}
    ids = {_metadata(a, SERVER) for a in answers if _metadata(a, "node") == node and home(a).partition(":")[0] in boots}
    known = f"server id {' or '.join(sorted(ids - {''}))}, " if ids - {""} else ""
    who = ", ".join(sorted(f"{twin['name']} with pid {_metadata(twin, 'pid')}" for twin in twins[:NAMED_MAX]))
    who += f" and {len(twins) - NAMED_MAX} more" if len(twins) > NAMED_MAX else ""
    return FailedPrecondition(
        f"another node of the name {node!r} is on this bus ({known}{who}): stop it, or give one of the two another"
        " name (WHERRY_NODE, `wherry up --node`)"
    )


def _metadata(answer: dict[str, Any], name: str) -> str:
    found = answer.get("metadata")
    return str(found.get(name, "")) if isinstance(found, dict) else ""
