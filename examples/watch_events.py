"""Print every lifecycle event of a node with nothing but a NATS client: events are plain JSON on plain subjects."""

import asyncio
import contextlib
import json
import os
import pathlib

import nats

STATE = pathlib.Path(os.environ.get("WHERRY_STATE", "/run/wherry"))
SEED = os.environ.get("WHERRY_CREDS", str(STATE / "creds" / "observer.nk"))  # may read events, and nothing else


async def main() -> None:
    bus = await nats.connect(json.loads((STATE / "node.json").read_text())["nats"], nkeys_seed=SEED)
    events = await bus.subscribe("wherry.ev.v1.>")
    print("watching", flush=True)
    async for message in events.messages:
        event = json.loads(message.data)
        print(event["timestamp"], event["namespace"], event["topic"], json.dumps(event["event"]), flush=True)


with contextlib.suppress(KeyboardInterrupt):
    asyncio.run(main())
