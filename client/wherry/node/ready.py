"""Whether a node's name is free on a bus of others, and when every service of it answers there."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from wherry_shared.bus import connect, discovery, twins
from wherry_shared.bus.credentials import ADMIN, find
from wherry_shared.errors import Unavailable, WherryError

READY_SECONDS = 60.0


def refuse_twin(url: str, node: str, creds: Path, root: Path) -> None:
    """FailedPrecondition when another node of this name is on the bus; without one, who comes first is alone."""
    import uvloop

    uvloop.run(_refuse_twin(url, node, creds, root))


async def _refuse_twin(url: str, node: str, creds: Path, root: Path) -> None:
    own = find(creds, ADMIN)
    try:
        bus = await connect(url.split(","), node=node, name="probe", seed=own.seed, inbox_prefix=own.inbox_prefix)
    except WherryError:
        return  # the services have to say what is wrong, and look for themselves
    try:
        answers = await discovery.ask_all(bus.transport, "PING", wait=twins.ANSWER_SECONDS)
    finally:
        await bus.close()
    homes = {str(answer["name"]): twins.home_of(root / str(answer["name"])) for answer in answers}
    if found := twins.strangers(answers, node, homes):
        raise twins.refusal(node, found, answers)


def wait_until_ready(url: str, node: str, creds: Path, services: int) -> None:
    """Return when `services` processes answer to discovery. Exits 1 after a minute."""
    import uvloop

    uvloop.run(_wait(url, node, creds, services))


async def _wait(url: str, node: str, creds: Path, services: int) -> None:
    own = find(creds, ADMIN)
    give_up = time.monotonic() + READY_SECONDS
    bus = await connect(url.split(","), node=node, name="probe", seed=own.seed, inbox_prefix=own.inbox_prefix)
    expect = services
    try:
        while time.monotonic() < give_up:
            try:
                answers = await discovery.ask_all(bus.transport, "PING", wait=0.25, expect=expect)
            except Unavailable:
                answers = []
            expect = 0  # other nodes on the same bus answer too: from now on all are heard out
            mine = [a for a in answers if a.get("metadata", {}).get("node") == node]
            if len(mine) >= services:
                return
            await asyncio.sleep(0.05)
    except WherryError as e:
        raise SystemExit(str(e)) from None
    finally:
        await bus.close()
    raise SystemExit(1)
