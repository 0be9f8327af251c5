"""How long mutations wait while 10,000 dead among 50,000 objects are collected.

    python -m bench.collection [OBJECTS DEAD]     on a node of its own

One loop for each service changes something all the time, the next as soon as the last is answered. The wait is the
longest that any of these calls took while the collection ran.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from wherry import Client
from wherry_shared import context
from wherry_shared.api.container import Container, Runtime
from wherry_shared.api.gc import Collections
from wherry_shared.api.image import Image
from wherry_shared.values import Descriptor

OBJECTS, DEAD = 50_000, 10_000
LAYERS = 6
CALLERS = 16
SNAPSHOTTER = "overlay"
REF = "containerd.io/gc.ref"
CONFIG = "application/vnd.oci.image.manifest.v1+json"


async def _each(work: Callable[[int], Awaitable[None]], numbers: Iterable[int]) -> None:
    """By so many callers at once."""
    queue = iter(numbers)

    async def caller() -> None:
        for number in queue:
            await work(number)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


def _put(client: Client, name: str, labels: dict[str, str] | None = None) -> Awaitable[object]:
    return client.content.put(name.encode(), _digest(name), labels or {})


def _digest(name: str) -> str:
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"


async def _manifest(client: Client, kind: str, number: int) -> str:
    """A manifest with its layers and the snapshot of the topmost: eight objects."""
    name = f"{kind}-{number}"
    for layer in range(LAYERS):
        await _put(client, f"{name}-{layer}")
    await client.snapshots.prepare(SNAPSHOTTER, name)
    labels = {f"{REF}.content.l.{layer}": _digest(f"{name}-{layer}") for layer in range(LAYERS)}
    await _put(client, name, {**labels, f"{REF}.snapshot.{SNAPSHOTTER}": name})
    return name


async def fill(client: Client, objects: int = OBJECTS, dead: int = DEAD) -> None:
    """Images with what they refer to, and as many objects as are to die, which a lease keeps until then."""
    await client.leases.create("live")
    await client.leases.create("dead")

    async def one_live(number: int) -> None:
        with context.use(lease="live"):
            name = await _manifest(client, "live", number)
            target = Descriptor(media_type=CONFIG, digest=_digest(name), size=len(name))
            await client.images.create(Image(name=name, target=target))

    async def one_dead(number: int) -> None:
        with context.use(lease="dead"):
            await _manifest(client, "dead", number)

    await _each(one_live, range((objects - dead) // (LAYERS + 3)))
    await _each(one_dead, range(dead // (LAYERS + 2)))
    await client.leases.delete("live", sync=True)


class Loops:
    """One caller for each service, and how long its calls take."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.waits: dict[str, list[float]] = {}

    async def _loop(self, name: str, work: Callable[[int], Awaitable[object]]) -> None:
        number = 0
        while True:
            began = time.perf_counter()
            await work(number)
            self.waits.setdefault(name, []).append(time.perf_counter() - began)
            number += 1

    async def run(self, until: Awaitable[object]) -> float:
        """The longest call of any loop until then, in seconds."""
        client, own = self._client, secrets.token_hex(4)

        # One mutation at a time is measured: what one makes, the next takes away.
        async def lease(number: int) -> None:
            if number % 2:
                await client.leases.delete(f"l-{own}-{number - 1}")
            else:
                await client.leases.create(f"l-{own}-{number}")

        async def container(number: int) -> None:
            if number % 2:
                await client.containers.delete(f"c-{own}-{number - 1}")
            else:
                await client.containers.create(Container(id=f"c-{own}-{number}", runtime=Runtime(name="runc")))

        loops = {
            "image": lambda n: client.images.update(
                Image(name="live-0", target=Descriptor(media_type="x", digest=_digest("x"), size=1),
                      labels={"n": str(n)}), ["labels.n"],
            ),
            "content": lambda n: client.content.update(_digest("live-0"), {"n": str(n)}, ["labels.n"]),
            "snapshot": lambda n: client.snapshots.update(SNAPSHOTTER, "live-0", {"n": str(n)}, ["labels.n"]),
            "lease": lease, "container": container,
        }  # fmt: skip
        tasks = [asyncio.create_task(self._loop(name, work)) for name, work in loops.items()]
        try:
            await until
        finally:
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in done:
            if not isinstance(outcome, asyncio.CancelledError):
                raise RuntimeError(f"a loop ended: {outcome!r}")
        return max(max(waits) for waits in self.waits.values())


async def measure(client: Client) -> dict[str, float]:
    """Seconds: `gc_pause` the longest wait, `quiet` the longest without a collection, `run` the whole of it."""
    quiet = await Loops(client).run(asyncio.sleep(1.0))
    loops = Loops(client)
    began = time.perf_counter()
    collected = await _collected(client, loops)
    waits = {f"wait_{name}": max(found) for name, found in loops.waits.items()}
    return {
        "gc_pause": max(waits.values()), "quiet": quiet, "run": time.perf_counter() - began,
        "frozen": collected[0], "removed": collected[1], **waits,
    }  # fmt: skip


async def _collected(client: Client, loops: Loops) -> tuple[float, float]:
    found: list[tuple[float, float]] = []

    async def collect() -> None:
        await client.leases.delete("dead")
        collected = await client.bus.proxy(Collections).collect()
        found.append((collected.longest_wait, sum(collected.removed.values())))

    await loops.run(collect())
    return found[0]


async def _main(objects: int, dead: int) -> None:
    import wherry

    from .lab import Lab  # noqa: F401 - the images' path
    from .wherry_side import WherryNode

    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="wherry-bench-") as base, WherryNode(Path(base)) as node:
        settings = node.settings()
        async with wherry.connect(state=settings["state"], namespace=settings["namespace"]) as client:
            began = time.perf_counter()
            await fill(client, objects, dead)
            print(f"filled in {time.perf_counter() - began:.1f} s", flush=True)
            for name, value in (await measure(client)).items():
                print(f"{name:16}{value * (1 if name == 'removed' else 1e3):10.1f}")


if __name__ == "__main__":
    asyncio.run(_main(*([int(a) for a in sys.argv[1:]] or [OBJECTS, DEAD])))
