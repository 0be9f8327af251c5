"""What is measured, done with Wherry: the same steps as containerd_client's, through the rich client's proxies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import wherry
from wherry.client import walk
from wherry.container import DEFAULT_RUNTIME
from wherry_shared import streams
from wherry_shared.api.container import Container as Record
from wherry_shared.api.container import Runtime
from wherry_shared.api.events import Envelope
from wherry_shared.api.image import Image
from wherry_shared.errors import DeadlineExceeded, Unavailable
from wherry_shared.values import Descriptor

from . import collection, spec
from .containerd_client import EVENT_LABELS, KEEP
from .driver import MeasureError

_SNAPSHOTTER = "overlay"
_TOPIC = "/bench/event"


class Container:
    """One container and its snapshot, step by step."""

    def __init__(self, client: wherry.Client, id: str, image: str, top: str, runtime: str) -> None:
        self._client = client
        self._image, self._top, self._runtime = image, top, runtime
        self.id = id

    async def create(self, args: Sequence[str]) -> None:
        client = self._client
        mounts = await client.snapshots.prepare(_SNAPSHOTTER, self.id, self._top, labels=KEEP)
        record = Record(
            id=self.id, image=self._image, runtime=Runtime(name=self._runtime), spec=spec.make("", args),
            snapshotter=_SNAPSHOTTER, snapshot_key=self.id,
        )  # fmt: skip
        await client.containers.create(record)
        await client.tasks.create(self.id, mounts)

    async def start(self) -> None:
        await self._client.tasks.start(self.id)

    async def kill(self) -> None:
        await self._client.tasks.kill(self.id, 9)

    async def wait(self, exec_id: str = "") -> int:
        exit = await self._client.tasks.wait(self.id, exec_id, patience=20.0)
        if exit is None:
            raise MeasureError(f"{self.id} had not ended after 20 s")
        return exit.exit_status

    async def delete(self) -> None:
        await self._client.tasks.delete(self.id)
        await self._client.containers.delete(self.id)
        await self._client.snapshots.remove(_SNAPSHOTTER, self.id)

    async def exec(self, name: str, args: Sequence[str]) -> int:
        """Run a process in it to its end; answers its exit code."""
        tasks = self._client.tasks
        await tasks.exec(self.id, name, spec.process(args))
        await tasks.start(self.id, name)
        status = await self.wait(name)
        await tasks.delete(self.id, name)
        return status


class WherryClient:
    """The methods that bench.driver calls; times in seconds unless told otherwise."""

    def __init__(self, client: wherry.Client, settings: dict[str, str]) -> None:
        self._client = client
        self._settings = settings
        self._busy: Container | None = None
        self._many: list[Container] = []
        self._ending: dict[str, int] = {}
        self._serial = 0

    @classmethod
    async def connect(cls, settings: dict[str, str]) -> WherryClient:
        client = await wherry.connect(state=settings["state"], namespace=settings["namespace"])
        return cls(client, settings)

    async def close(self) -> None:
        await self._client.close()

    async def ping(self) -> None:
        await self._client.ensure_namespace()

    # ---- images

    async def pull(self, reference: str) -> float:
        began = time.perf_counter()
        await self._client.pull(reference, unpack=True)
        return time.perf_counter() - began

    async def has_snapshot(self, chain_id: str) -> bool:
        await self._client.snapshots.stat(_SNAPSHOTTER, chain_id)
        return True

    def _image(self, name: str) -> Image:
        target = Descriptor(
            media_type="application/vnd.oci.image.manifest.v1+json", digest=f"sha256:{'0' * 64}", size=1234
        )
        return Image(name=name, target=target)

    async def create_image(self, name: str) -> None:
        await self._client.images.create(self._image(name))

    async def request_times(self, name: str, count: int) -> list[float]:
        """One caller: the time of each `get`."""
        get, times = self._client.images.get, []
        for _ in range(count):
            began = time.perf_counter()
            await get(name)
            times.append(time.perf_counter() - began)
        return times

    async def request_rate(self, name: str, count: int, callers: int) -> float:
        """`get`s per second."""
        get = self._client.images.get
        took = await _side_by_side(get, [name] * count, callers)
        return count / took

    async def create_delete_rate(self, count: int, callers: int) -> float:
        """Creates and deletes per second, each caller deleting what it created."""
        self._serial += 1
        images = self._client.images

        async def both(name: str) -> None:
            await images.create(self._image(name))
            await images.delete(name)

        took = await _side_by_side(both, [f"r{self._serial}/n{number}" for number in range(count)], callers)
        return 2 * count / took

    async def fill(self, count: int, callers: int) -> None:
        names = [f"list/image-{number:05}" for number in range(count)]
        await _side_by_side(self.create_image, names, callers)

    async def collection_pause(self, objects: int, dead: int) -> float:
        """Seconds that a mutation waited at most while so many dead were collected."""
        await collection.fill(self._client, objects, dead)
        return (await collection.measure(self._client))["gc_pause"]

    async def list_time(self, at_least: int) -> float:
        """All images, their names taken out of the answers."""
        began = time.perf_counter()
        names = [image.name for image in await walk(self._client.images.walk)]
        took = time.perf_counter() - began
        if len(names) < at_least:
            raise MeasureError(f"{len(names)} images were listed")
        return took

    # ---- containers

    async def _container(self, image: str, top: str, runtime: str) -> Container:
        self._serial += 1
        return Container(self._client, f"bench-{self._serial}", image, top, runtime)

    async def life_time(self, image: str, top: str, runtime: str) -> float:
        """Snapshot, container and task made, started, waited for and deleted. runtime "": the node's default."""
        container = await self._container(image, top, runtime or DEFAULT_RUNTIME)
        began = time.perf_counter()
        await container.create(["true"])
        await container.start()
        status = await container.wait()
        await container.delete()
        took = time.perf_counter() - began
        if status:
            raise MeasureError(f"`true` ended with status {status}")
        return took

    async def start_gated(self, image: str, top: str, count: int, ending: int, callers: int) -> list[int]:
        """Start `count` containers; each of the first `ending` ends when a file /gate is there, with a status of its
        own. Answers their pids."""
        self._many = [await self._container(image, top, DEFAULT_RUNTIME) for _ in range(count)]
        self._ending = {c.id: 20 + number for number, c in enumerate(self._many[:ending])}

        async def run(container: Container) -> None:
            status = self._ending.get(container.id)
            wait = "while [ ! -e /gate ]; do sleep 0.02; done"
            await container.create(["sleep", "1000000"] if status is None else ["sh", "-c", f"{wait}; exit {status}"])
            await container.start()

        await _side_by_side(run, self._many, callers)
        return [(await self._client.tasks.get(id)).pid for id in self._ending]

    async def told_right(self) -> int:
        """Of how many that have ended the status is right, and was told in one event; the others must run on."""
        asking = {c.id: asyncio.ensure_future(self._patiently(c)) for c in self._many if c.id in self._ending}
        codes = {id: await answer for id, answer in asking.items()}
        await asyncio.sleep(1.0)  # for one that is told too often
        window = await self._client.events.replay(filters=['topic=="/tasks/exit"'])
        told = [(str(e.event["container_id"]), int(e.event["exit_status"])) for e in window.events]
        for container in self._many:
            if container.id not in self._ending and (await self._client.tasks.get(container.id)).status != "running":
                raise MeasureError(f"{container.id} runs no longer")
        return sum(codes[id] == code and told.count((id, code)) == 1 for id, code in self._ending.items())

    async def _patiently(self, container: Container) -> int:
        """Its exit status, from the next task service if the one that was asked is gone."""
        while True:
            try:
                return await container.wait()
            except (Unavailable, DeadlineExceeded):
                await asyncio.sleep(0.1)

    async def run_busy(self, image: str, top: str, runtime: str) -> None:
        """A container that execs go into."""
        self._busy = await self._container(image, top, runtime or DEFAULT_RUNTIME)
        await self._busy.create(["sleep", "1000000"])
        await self._busy.start()

    async def exec_time(self) -> float:
        assert self._busy is not None
        self._serial += 1
        began = time.perf_counter()
        status = await self._busy.exec(f"exec-{self._serial}", ["true"])
        took = time.perf_counter() - began
        if status:
            raise MeasureError(f"`true` ended with status {status}")
        return took

    async def end_busy(self) -> None:
        assert self._busy is not None
        await self._busy.kill()
        await self._busy.wait()
        await self._busy.delete()

    async def start_many(self, image: str, top: str, runtime: str, count: int, callers: int) -> float:
        """Containers that sleep, made and started by so many callers at once. runtime "": the node's default."""
        self._many = [await self._container(image, top, runtime or DEFAULT_RUNTIME) for _ in range(count)]

        async def up(container: Container) -> None:
            await container.create(["sleep", "1000000"])
            await container.start()

        return await _side_by_side(up, self._many, callers)

    async def stop_many(self, callers: int) -> float:
        """All of them killed, waited for and deleted."""

        async def down(container: Container) -> None:
            await container.kill()
            await container.wait()
            await container.delete()

        return await _side_by_side(down, self._many, callers)

    # ---- events

    async def event_times(self, subscribers: int, count: int) -> list[float]:
        """From the publish call until the last subscriber has it, for one event after the other."""
        times = []
        async with Audience(self._settings, subscribers) as audience:
            for number in range(count):
                began = time.perf_counter()
                published = asyncio.ensure_future(self._publish(number))
                await audience.heard(subscribers)
                times.append(time.perf_counter() - began)
                await published
        return times

    async def event_rate(self, subscribers: int, count: int, callers: int) -> float:
        """Deliveries per second, with so many publish calls under way at once."""
        async with Audience(self._settings, subscribers) as audience:
            began = time.perf_counter()
            publishing = asyncio.ensure_future(_side_by_side(self._publish, range(count), callers))
            await audience.heard(count * subscribers)
            took = time.perf_counter() - began
            await publishing
        return count * subscribers / took

    async def _publish(self, number: int) -> Envelope:
        return await self._client.events.publish(_TOPIC, {"name": f"bench-{number}", "labels": EVENT_LABELS})

    # ---- content

    async def ingest_time(self, path: str, size: int, digest: str) -> float:
        return await _ingest(self._client, path, size, digest, local=True)

    async def write_time(self, path: str, size: int, digest: str) -> float:
        """The same with no byte past the bus."""
        async with self._on_the_bus() as client:
            return await _ingest(client, path, size, digest, local=False)

    def _on_the_bus(self) -> AbstractAsyncContextManager[wherry.Client]:
        """A client as on another host."""
        return wherry.connect(state=self._settings["state"], namespace=self._settings["namespace"], direct=False)

    async def read_time(self, size: int, digest: str) -> float:
        began = time.perf_counter()
        got = 0
        async for chunk in streams.read_blob(self._client.content, digest):
            got += len(chunk)
        took = time.perf_counter() - began
        if got < size:
            raise MeasureError(f"{got} of {size} bytes were read")
        return took

    async def read_bus_rate(self, readers: int, size: int, digest: str) -> float:
        """Bytes per second over the bus alone, by so many readers with a connection each."""
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(self._on_the_bus()) for _ in range(readers)]
            began = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for client in clients:
                    group.create_task(_read_all(client, digest, size))
            return readers * size / (time.perf_counter() - began)


async def _ingest(client: wherry.Client, path: str, size: int, digest: str, *, local: bool) -> float:
    began = time.perf_counter()
    with open(path, "rb") as source:
        async with streams.BlobWriter(client.content, digest[7:23], total=size, expected=digest, local=local) as writer:
            await writer.copy_from(source)
            await writer.commit(labels=KEEP)
    return time.perf_counter() - began


class Audience:
    """Subscribers with a connection each, counting what they hear."""

    def __init__(self, settings: dict[str, str], size: int) -> None:
        self._settings = settings
        self._size = size
        self._stack = AsyncExitStack()
        self._count = 0
        self._wanted = 0
        self._reached = asyncio.Event()

    async def __aenter__(self) -> Audience:
        for _ in range(self._size):
            client = await self._stack.enter_async_context(
                wherry.connect(state=self._settings["state"], namespace=self._settings["namespace"])
            )
            subscriber = await client.bus.subscribe(namespace=self._settings["namespace"], topic=_TOPIC)
            await self._stack.enter_async_context(subscriber)
            listening = asyncio.ensure_future(self._listen(subscriber))
            self._stack.callback(listening.cancel)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _listen(self, subscriber: Any) -> None:
        async for _ in subscriber:
            self._count += 1
            if self._count >= self._wanted:
                self._reached.set()

    async def heard(self, more: int) -> None:
        """Return when so many more deliveries than the last time were made."""
        self._wanted += more
        self._reached.clear()
        if self._count < self._wanted:
            async with asyncio.timeout(60):
                await self._reached.wait()


async def _read_all(client: wherry.Client, digest: str, size: int) -> None:
    got = 0
    async for chunk in streams.read_blob(client.content, digest, local=False):
        got += len(chunk)
    if got < size:
        raise MeasureError(f"{got} of {size} bytes were read")


async def _side_by_side(work: Callable[[Any], Awaitable[Any]], items: Iterable[Any], callers: int) -> float:
    """Each item by one of `callers` tasks; how long all of it took."""
    waiting = iter(items)

    async def caller() -> None:
        for item in waiting:
            await work(item)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return time.perf_counter() - began
