"""What is broken on a node, why, and what to do: `wherry doctor`.

What services can tell is asked over the bus, from anywhere. On the node itself its files, processes and kernel are
looked at too; what could not be looked at is said. Nothing is ever changed.
"""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wherry_shared import context
from wherry_shared.api import contracts
from wherry_shared.boot import boot_id
from wherry_shared.bus import discovery
from wherry_shared.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    WherryError,
)  # fmt: skip
from wherry_shared.runtime import NODE_FILE

from ..client import DEFAULT_STATE, connect
from ..together import each
from . import afar, files, host, leftovers
from .findings import Check, Finding, LeftOut, Patient, Place, Report

if TYPE_CHECKING:
    from ..client import Client

__all__ = ["Finding", "LeftOut", "Report", "examine"]

CALL_SECONDS, CHECK_SECONDS = 5.0, 60.0
PARALLEL = 4
# What answers so is broken, and not just out of sight.
_BROKEN = (DeadlineExceeded, Unavailable, DataLoss, Internal)
ANSWER_SECONDS, SECOND_ANSWER_SECONDS = 0.25, 1.0
CHECKS: tuple[Check, ...] = (*afar.CHECKS, *host.CHECKS, *files.CHECKS, *leftovers.CHECKS)


async def examine(*, state: str = "", nats: str = "", node: str = "", creds: str = "") -> Report:
    """Look at all of a node; it is found as by `wherry.connect`, and need not be up. PermissionDenied: for tenants."""
    report = Report()
    try:
        client = await connect(state=state, nats=nats, node=node, creds=creds)
    except (Unavailable, Unauthenticated, FailedPrecondition) as e:
        report.findings.append(_no_bus(e))
        directory = Path(state or os.environ.get("WHERRY_STATE", DEFAULT_STATE))
        await _look(Patient(None, _place_on_disk(directory)), report)
        return report
    async with client:
        if not client.is_admin:
            raise PermissionDenied("who examines a node has to be its admin")
        answers = await _answers(client)
        place = await _place(client, known="introspection" in answers)
        await _look(Patient(client, place, answers), report)
    return report


def _no_bus(e: WherryError) -> Finding:
    todo = {
        Unauthenticated: "WHERRY_CREDS names the admin's seed; it has to be its owner's alone, mode 0600",
        FailedPrecondition: "bring nats-server up to date: 2.12.7 or 2.14.0 at least",
    }.get(type(e), "start the node (`wherry up`, or systemctl start wherry.target); look at nats-server's log")
    return Finding("broken", "bus", "the bus cannot be reached", str(e), todo)


async def _answers(client: Client) -> dict[str, list[dict[str, Any]]]:
    """What the node's services tell of themselves; who did not answer at once is asked again."""
    wanted = {contract.service for contract in contracts()}
    found: dict[str, list[dict[str, Any]]] = {}
    for wait in (ANSWER_SECONDS, SECOND_ANSWER_SECONDS):
        found = {}
        for answer in await discovery.ask_all(client.bus.transport, "STATS", wait=wait):
            metadata = answer.get("metadata")
            if isinstance(metadata, dict) and metadata.get("node") == client.address.node:
                found.setdefault(str(answer["name"]), []).append(answer)
        if wanted <= set(found):
            break
    return found


# ---- where the node is


async def _place(client: Client, *, known: bool) -> Place | None:
    """The node's directories, if they are on this host: proved by the id that its introspection service keeps there.

    known: whether that service is there to be asked. If not, what the node's supervisor wrote down has to do.
    """
    try:
        with context.use(timeout=CALL_SECONDS):
            server = await client.introspection.server() if known else None
    except WherryError:
        server = None
    if server is None:
        on_disk = _place_on_disk(client.address.state)
        return on_disk if on_disk is not None and on_disk.node == client.address.node else None
    root = Path(server.root)
    try:
        same = server.boot_id == boot_id()
        same = same and (root / "introspection" / "uuid").read_text().strip() == server.id
    except OSError:
        return None
    return Place(server.node, root, Path(server.state), client.address.creds.parent) if same else None


def _place_on_disk(state: Path) -> Place | None:
    """As the node's supervisor wrote it down; without that, what the environment says."""
    try:
        known = json.loads((state / NODE_FILE).read_text())
        return Place(str(known["node"]), Path(known["root"]), state, state / "creds")
    except (OSError, ValueError, KeyError, TypeError):
        root = Path(os.environ.get("WHERRY_ROOT", "/var/lib/wherry"))
        there = (root / "introspection").is_dir()
        return Place(os.environ.get("WHERRY_NODE", ""), root, state, state / "creds") if there else None


# ---- the examination


async def _look(patient: Patient, report: Report) -> None:
    async def one(check: Check) -> tuple[list[Finding], str]:
        reason = _reason(check, patient)
        if reason:
            return [], reason
        try:
            with context.use(timeout=CHECK_SECONDS):
                return list(await check.look(patient)), ""
        except _BROKEN as e:
            return [_unanswered(check, e)] if patient.client is not None else [], str(e)
        except (WherryError, OSError, sqlite3.Error) as e:
            return [], str(e)

    for check, (found, reason) in zip(CHECKS, await each(one, CHECKS, PARALLEL), strict=True):
        report.findings += found
        if reason:
            report.left_out.append(LeftOut(check.part, reason))
        else:
            report.looked_at.append(check.part)


def _unanswered(check: Check, e: WherryError) -> Finding:
    """Its services are there, and do not do what was asked of them."""
    whose = f"the logs of {', '.join(check.needs)}" if check.needs else "the services' logs"
    return Finding("broken", check.part, f"{check.part} cannot be looked at", str(e), f"look at {whose}")


def _reason(check: Check, patient: Patient) -> str:
    """Why a check cannot be made; "" when it can."""
    if check.here and patient.place is None:
        return "the node's files are not on this host, or not this user's to read"
    if check.here and os.geteuid() != 0:
        return "only root may look at it"
    if patient.client is None and (check.needs or not check.here):
        return "the bus cannot be reached"
    silent = [name for name in check.needs if name not in patient.answers]
    return f"{', '.join(silent)} does not answer" if silent else ""
