"""Processes killed under a writer that goes on, and what keeps two of them apart."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from contentd import digest_of, ready
from wherry_content.backends.local_ingest import SAVE_BYTES
from wherry_shared import context
from wherry_shared.api.content import CHUNK, Content
from wherry_shared.bus import Bus
from wherry_shared.bus.proxy import at_instance
from wherry_shared.errors import Unavailable
from wherry_shared.streams import BlobWriter, read_blob

LARGE = os.urandom(1 << 20) * 96
LARGE_DIGEST = digest_of(LARGE)

Spawn = Callable[..., "subprocess.Popen[bytes]"]


async def test_the_holder_is_killed_and_another_goes_on(spawn: Spawn, nats_bus: Bus, tmp_path: Path) -> None:
    content = nats_bus.proxy(Content, namespace="default")
    processes = {name: spawn(name) for name in ("one", "two")}
    await asyncio.gather(*(ready(content, name) for name in processes))
    (tmp_path / "source").write_bytes(LARGE)
    killed = ""
    with (tmp_path / "source").open("rb") as source, context.use(timeout=60):
        async with BlobWriter(content, "layer", expected=LARGE_DIGEST, total=len(LARGE), local=False) as writer:
            writing = asyncio.create_task(writer.copy_from(source))
            while not killed:
                status = await content.status("layer")
                if status.durable >= SAVE_BYTES:
                    killed = writer._instance._caller._instance  # type: ignore[attr-defined]
                    processes[killed].kill()
                    processes[killed].wait()
                await asyncio.sleep(0.01)
            await writing
            assert (await writer.commit()).size == len(LARGE)
    other = "two" if killed == "one" else "one"
    await at_instance(content, other).verify(LARGE_DIGEST)
    assert b"".join([c async for c in read_blob(content, LARGE_DIGEST, local=False, verify=True)]) == LARGE
    assert await content.statuses() == []


async def test_unavailable_soon_when_nobody_is_left(spawn: Spawn, nats_bus: Bus) -> None:
    content = nats_bus.proxy(Content, namespace="default")
    process = spawn("one")
    await ready(content, "one")
    async with BlobWriter(content, "layer", local=False, patience=0.5) as writer:
        await writer.write(LARGE[: 4 * CHUNK])
        process.kill()
        process.wait()
        with pytest.raises(Unavailable), context.use(timeout=5):
            await writer.write(LARGE[: 20 * CHUNK])
            await writer.commit()
    spawn("one")
    await ready(content, "one")
    assert (await content.status("layer")).offset >= 0


async def test_a_private_backend_has_one_service_on_a_root(spawn: Spawn, nats_bus: Bus) -> None:
    first = spawn("one", "backend=memory")
    await ready(nats_bus.proxy(Content, namespace="default"), "one")
    assert await asyncio.to_thread(spawn("two", "backend=memory").wait, 60) == 1
    assert first.poll() is None
