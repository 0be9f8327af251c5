"""The service as it is run: its own process on a real nats-server, killed and started again."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable

import pytest
from contentd import digest_of, ready
from wherry_shared import context
from wherry_shared.api.content import CHUNK, Content
from wherry_shared.bus import Bus
from wherry_shared.bus.proxy import at_instance
from wherry_shared.streams import BlobWriter, read_blob

DATA = os.urandom(1 << 20) * 24
DIGEST = digest_of(DATA)

Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.mark.parametrize("local", [True, False], ids=["file", "bus"])
async def test_killed_under_a_writer_that_goes_on(spawn: Spawn, nats_bus: Bus, local: bool) -> None:
    content = nats_bus.proxy(Content, namespace="default")
    process = spawn("one")
    await ready(content, "one")
    async with BlobWriter(content, "layer", expected=DIGEST, total=len(DATA), local=local) as writer:
        assert writer.is_local is local
        for at in range(0, len(DATA), CHUNK):
            await writer.write(DATA[at : at + CHUNK])
            if at == len(DATA) // 2:
                process.kill()
                process.wait()
                spawn("one")
        assert (await writer.commit(labels={"a": "b"})).labels == {"a": "b"}
    assert b"".join([c async for c in read_blob(content, DIGEST, local=local, verify=True)]) == DATA


async def test_two_processes_on_one_root(spawn: Spawn, nats_bus: Bus) -> None:
    content = nats_bus.proxy(Content, namespace="default")
    processes = [spawn("one"), spawn("two")]
    await asyncio.gather(ready(content, "one"), ready(content, "two"))
    opened = await content.open("layer")
    holder, other = at_instance(content, opened.instance), "two" if opened.instance == "one" else "one"
    await holder.write("layer", 0, DATA[:CHUNK])
    victim = processes[0 if opened.instance == "one" else 1]
    victim.kill()
    victim.wait()
    with context.use(timeout=60):
        again = await content.open("layer")  # the lock died with its process
    assert (again.instance, again.offset) == (other, CHUNK)
    info = await at_instance(content, other).commit("layer")
    assert info.digest == digest_of(DATA[:CHUNK])


async def test_a_stop_in_good_order(spawn: Spawn, nats_bus: Bus) -> None:
    content = nats_bus.proxy(Content, namespace="default")
    process = spawn("one")
    await ready(content, "one")
    opened = await content.open("layer")
    await at_instance(content, opened.instance).write("layer", 0, DATA[:CHUNK])
    process.terminate()
    assert await asyncio.to_thread(process.wait, 60) == 0


@pytest.mark.parametrize("setting", ["sharing=everybody", "idle=soon", "backend=floppy"])
def test_a_wrong_setting_is_told_at_the_start(spawn: Spawn, setting: str) -> None:
    assert spawn("one", setting).wait(60) == 1
