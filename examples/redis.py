"""Run a Redis for a moment, talk to it, and clean up: the example of containerd's announcement, in Python.

wherry up &
python examples/redis.py docker.io/library/redis:alpine
"""

from __future__ import annotations

import asyncio
import signal
import sys

import wherry

IMAGE = sys.argv[1] if len(sys.argv) > 1 else "docker.io/library/redis:alpine"


async def main() -> int:
    async with wherry.connect(namespace="cpuguy") as client:  # everything is namespaced
        image = await client.pull(IMAGE, unpack=True)
        print(f"pulled {image.name} {image.target.digest}")

        async with (
            client.new_container("my-redis", image, snapshot="my-redis-rootfs") as container,
            container.new_task(stdio=wherry.Stdio.output()) as task,
        ):
            exited = asyncio.create_task(task.wait())  # wait before start: no exit can be missed
            # Networks would be set up here, before the task starts.
            await task.start()
            await talk(task)
            try:
                status = await asyncio.wait_for(asyncio.shield(exited), timeout=10)
            except TimeoutError:
                await task.kill(signal.SIGKILL)
                status = await exited
            print(f"redis ended with {status.code}")
    return 0 if status.code == 128 + signal.SIGKILL else status.code


async def talk(task: wherry.Task) -> None:
    """A SET and a GET, by redis-cli inside the container."""
    for _ in range(50):
        if (await task.run(["redis-cli", "PING"])).stdout.strip() == b"PONG":
            break
        await asyncio.sleep(0.1)
    for command in (["SET", "greeting", "hello from wherry"], ["GET", "greeting"]):
        answer = await task.run(["redis-cli", *command])
        print(f"redis-cli {' '.join(command)}: {answer.stdout.decode().strip()}", flush=True)


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
