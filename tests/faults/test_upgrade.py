"""Services of today on databases of the first schema: they migrate, every row is there, and there is no way back."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from rebuilt import event_stream
from wherry_shared.api.container import Containers
from wherry_shared.api.content import Content
from wherry_shared.api.gc import Collections
from wherry_shared.api.image import Images
from wherry_shared.api.lease import Leases
from wherry_shared.api.namespace import Namespaces
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.api.task import Tasks
from wherry_shared.bus import Bus
from wherry_shared.errors import FailedPrecondition, NotFound
from wherry_shared.memory import MemoryTransport
from wherry_shared.runtime import Host, Settings

from . import old_schema
from .old_schema import BLOB, DIGEST

NODE = "n1"
SERVICES = tuple(old_schema.SCRIPTS)
STORAGE = tuple(service for service in SERVICES if service != "task")


async def build(service: str, root: Path, bus: Bus, stack: AsyncExitStack) -> None:
    """The service as its process builds it, served on `bus`."""
    settings = Settings(service, NODE, root / "root", root / "state", "", root / "creds", options={})
    host = Host(settings, bus, stack)
    made: Any = await import_module(f"wherry_{service}.__main__").build(host)
    for each in (*host.also, made):
        server = await bus.serve(each, instance=host.instance, metadata=host.metadata)
        stack.push_async_callback(server.drain)


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    old_schema.make(tmp_path / "root")
    made: Bus = Bus(MemoryTransport(), node=NODE)
    await event_stream(made)
    yield made
    await made.close()


async def test_every_row_is_there(bus: Bus, tmp_path: Path) -> None:
    """Twice: what has migrated opens again."""
    for _ in range(2):
        async with AsyncExitStack() as stack:
            for service in STORAGE:
                await build(service, tmp_path, bus, stack)
            await look(bus)
            # Nobody noted then which bytes were durable: none have to count, all of them may.
            ingest = await bus.proxy(Content, namespace="default").status("half")
            assert (ingest.total, ingest.offset in range(6)) == (100, True)
            await bus.drain()


async def look(bus: Bus) -> None:
    content, snapshots, leases = (bus.proxy(c, namespace="default") for c in (Content, Snapshots, Leases))
    blob = await content.info(DIGEST)
    assert (blob.size, blob.labels, blob.created_at.isoformat()) == (len(BLOB), {"a": "b"}, old_schema.AT)
    assert await content.read(DIGEST) == BLOB
    image = await bus.proxy(Images, namespace="default").get("img:1")
    assert (image.target.digest, image.labels) == (DIGEST, {"a": "b"})
    container = await bus.proxy(Containers, namespace="default").get("c1")
    assert (container.snapshot_key, container.spec, container.runtime.name) == ("top", {"x": 1}, "runc")
    assert [lease.id for lease in (await leases.walk()).items] == ["l1"]
    assert [(r.type, r.id) for r in (await leases.resources("l1")).items] == [("content", DIGEST)]
    assert (await bus.proxy(Namespaces).get("old")).labels == {"a": "b"}
    base, top = await snapshots.stat("native", "base"), await snapshots.stat("native", "top")
    assert (base.kind, base.labels, top.kind, top.parent) == ("committed", {"a": "b"}, "active", "base")
    assert (await snapshots.mounts("native", "top"))[0].source.endswith("/2")


async def test_old_rows_are_collected_like_new_ones(bus: Bus, tmp_path: Path) -> None:
    """The collector sees what was there before it was: what nothing names goes, the rest stays."""
    async with AsyncExitStack() as stack:
        for service in STORAGE:
            await build(service, tmp_path, bus, stack)
        content, snapshots, leases = (bus.proxy(c, namespace="default") for c in (Content, Snapshots, Leases))
        await bus.proxy(Collections).collect()
        await look(bus)
        await leases.delete("l1")
        await bus.proxy(Containers, namespace="default").delete("c1")
        await bus.proxy(Collections).collect()
        assert (await content.info(DIGEST)).size == len(BLOB)  # the image names it
        await bus.proxy(Images, namespace="default").delete("img:1")
        await bus.proxy(Collections).collect()
        with pytest.raises(NotFound):
            await content.info(DIGEST)
        for name in ("top", "base"):
            with pytest.raises(NotFound):
                await snapshots.stat("native", name)
        await bus.drain()


async def test_a_task_that_ended_before_keeps_its_exit(bus: Bus, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        await build("task", tmp_path, bus, stack)
        process = await bus.proxy(Tasks, namespace="default").get("c1")
        assert (process.status, process.exit_status) == ("stopped", 42)
        await bus.drain()


@pytest.mark.parametrize("service", SERVICES)
async def test_a_newer_schema_is_refused_by_name(bus: Bus, tmp_path: Path, service: str) -> None:
    path = tmp_path / "root" / service / "metadata.db"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    before = path.read_bytes()
    async with AsyncExitStack() as stack:
        with pytest.raises(FailedPrecondition, match=rf"{path} has schema 99.*run the newer one"):
            await build(service, tmp_path, bus, stack)
    assert path.read_bytes() == before
