"""Who is alive on the bus: NATS micro discovery, asked of everybody at once."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

from .transport import Message, Transport


async def ask_all(transport: Transport, verb: str, *, wait: float = 0.25, expect: int = 0) -> list[dict[str, Any]]:
    """Every answer to `$SRV.<verb>` (PING, INFO, STATS) that comes within `wait` seconds.

    expect: return as soon as so many have answered (0: wait in full).
    """
    answers: list[dict[str, Any]] = []
    done = asyncio.Event()

    def on_message(message: Message) -> None:
        try:
            answer = json.loads(message.data)
        except ValueError:
            return
        if isinstance(answer, dict) and answer.get("name"):
            answers.append(answer)
        if expect and len(answers) >= expect:
            done.set()

    inbox = f"{transport.inbox_prefix}.{secrets.token_hex(8)}"
    subscription = await transport.subscribe(inbox, on_message)
    try:
        transport.publish(f"$SRV.{verb}", b"", reply=inbox)
        try:
            async with asyncio.timeout(wait):
                await done.wait()
        except TimeoutError:
            pass
    finally:
        await subscription.unsubscribe()
    return sorted(answers, key=lambda a: (str(a["name"]), str(a.get("id", ""))))
