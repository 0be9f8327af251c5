"""`python -m power.load LOG NOTES SECONDS`: use a node, and note what was asked and what was answered, and when.

When is how long the disk's log was then. What is put into files and blobs follows from their names.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from image_house import Layout, digest_of, tar_of
from wherry.client import Client, connect
from wherry.spec import Options, make
from wherry.users import User
from wherry_shared.api.container import Container, Runtime
from wherry_shared.api.image import Image
from wherry_shared.api.task import Stdio
from wherry_shared.streams import write_blob
from wherry_shared.values import Descriptor, Mount

ROOT = {"containerd.io/gc.root": "1"}
TARGET = Descriptor(media_type="application/vnd.oci.image.manifest.v1+json", digest=f"sha256:{'0' * 64}", size=1)
FILES = 20


def text_of(name: str) -> bytes:
    """What a file or blob of that name holds: up to some 3 MB."""
    return name.encode() * (1, 60, 4000, 60000)[hash_of(name) % 4]


def hash_of(name: str) -> int:
    return int(digest_of(name.encode())[-8:], 16)


class Load:
    """Everything at once, for a time, with names that come once."""

    def __init__(self, client: Client, log: Path, notes: Path, seconds: float) -> None:
        self.client, self._log, self._end = client, log, time.monotonic() + seconds
        self._notes = notes.open("w", buffering=1)
        self._count = 0
        self.ground = Mount(type="bind", source=str(notes.parent / "rootfs"), options=["rbind", "ro"])

    def names(self, kind: str) -> Any:
        while time.monotonic() < self._end:
            self._count += 1
            yield f"{kind}-{self._count}"

    async def ask(self, verb: str, kind: str, key: str, call: Awaitable[Any], value: Any = None) -> Any:
        self._count += 1
        number = self._count
        self._note(number=number, asked=self._log.stat().st_size, verb=verb, kind=kind, key=key, value=value)
        answer = await call
        self._note(number=number, answered=self._log.stat().st_size, value=getattr(answer, "exit_status", value))
        return answer

    def _note(self, **note: Any) -> None:
        self._notes.write(json.dumps(note) + "\n")


async def images(load: Load) -> None:
    for name in load.names("image"):
        made = Image(name=name, target=TARGET, labels={"v": "1"})
        await load.ask("create", "image", name, load.client.images.create(made), "1")
        made = made.model_copy(update={"labels": {"v": "2"}})
        await load.ask("update", "image", name, load.client.images.update(made, ["labels.v"]), "2")
        if random.random() < 0.4:
            await load.ask("delete", "image", name, load.client.images.delete(name))


async def contents(load: Load) -> None:
    for name in load.names("content"):
        data = text_of(name)
        digest = digest_of(data)
        if len(data) < 900_000 and random.random() < 0.5:
            call: Awaitable[Any] = load.client.content.put(data, digest, ROOT)
        else:
            local = random.random() < 0.6
            call = write_blob(load.client.content, name, data, expected=digest, labels=ROOT, local=local)
        await load.ask("create", "content", digest, call)
        if random.random() < 0.4:
            await load.ask("delete", "content", digest, load.client.content.delete(digest))


async def containers(load: Load) -> None:
    for name in load.names("container"):
        made = Container(id=name, runtime=Runtime(name="default"), labels={"v": "1"})
        await load.ask("create", "container", name, load.client.containers.create(made), "1")
        if random.random() < 0.5:
            await load.ask("delete", "container", name, load.client.containers.delete(name))


async def namespaces(load: Load) -> None:
    for name in load.names("namespace"):
        await load.ask("create", "namespace", name, load.client.namespaces.create(name, {"v": "1"}), "1")
        await load.ask("create", "lease", name, load.client.leases.create(name, {"v": "1"}), "1")
        if random.random() < 0.5:
            await load.ask("delete", "lease", name, load.client.leases.delete(name))
            await load.ask("delete", "namespace", name, load.client.namespaces.delete(name))


async def events(load: Load) -> None:
    for name in load.names("event"):
        await load.ask("publish", "event", name, load.client.events.publish("/load/test", {"key": name}))
        await asyncio.sleep(random.random() / 50)


async def unpacks(load: Load) -> None:
    for name in load.names("unpack"):
        layers = [[f"{name}-{layer}-{number}" for number in range(FILES)] for layer in range(random.choice((1, 3)))]
        layout = Layout()
        archives = [tar_of({each: text_of(each) for each in names}) for names in layers]
        layout.name(layout.image(archives), full=(key := f"docker.io/library/{name}:1"))
        call = load.client.import_images(io.BytesIO(layout.tar()), unpack=True)
        await load.ask("create", "image", key, call, layers)
        if random.random() < 0.4:
            await load.ask("delete", "image", key, load.client.images.delete(key))


async def snapshots(load: Load) -> None:
    for name in load.names("snapshot"):
        prepared = load.client.snapshots.prepare("overlay", f"{name}-active", "", ROOT)
        (mount,) = await load.ask("create", "snapshot", f"{name}-active", prepared)
        for number in range(FILES):
            Path(mount.source, f"{name}-{number}").write_bytes(text_of(f"{name}-{number}"))
        committed = load.client.snapshots.commit("overlay", name, f"{name}-active", "", ROOT)
        await load.ask("commit", "snapshot", name, committed)


async def tasks(load: Load) -> None:
    for name in load.names("task"):
        spec = make(name, None, Options(args=["/bin/busybox", "sleep", f"0.{hash_of(name) % 5}"]), User())
        await load.client.containers.create(Container(id=name, runtime=Runtime(name="default"), spec=spec))
        await load.ask("create", "task", name, load.client.tasks.create(name, [load.ground], Stdio()))
        await load.ask("start", "task", name, load.client.tasks.start(name))
        await load.ask("end", "task", name, load.client.tasks.wait(name, patience=60))
        if random.random() < 0.7:
            await load.ask("delete", "task", name, load.client.tasks.delete(name))


WORKERS: tuple[Callable[[Load], Awaitable[None]], ...] = (
    images, images, contents, contents, containers, namespaces, events, events, unpacks, snapshots, tasks, tasks,
)  # fmt: skip


async def main(log: str, notes: str, seconds: str) -> None:
    async with connect() as client:
        await client.ensure_namespace()
        load = Load(client, Path(log), Path(notes), float(seconds))
        await asyncio.gather(*(worker(load) for worker in WORKERS))


if __name__ == "__main__":
    os.umask(0o077)
    asyncio.run(main(*sys.argv[1:]))
