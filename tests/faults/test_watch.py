"""A watcher sees every event once, also around a bus that died under it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import wherry
from housebus import PATIENCE
from node import WHERRY, Node, eventually
from wherry_shared import context
from wherry_shared.errors import WherryError


async def test_a_watcher_outlives_the_bus(node: Node, namespace: str) -> None:
    async with (
        wherry.connect(state=str(node.state), namespace=namespace) as watching,
        wherry.connect(state=str(node.state), namespace=namespace) as acting,
    ):
        seen: list[int] = []

        async def read() -> None:
            async for envelope in watch:
                seen.append(envelope.event["number"])
                if len(seen) == 20:
                    return

        watch = watching.watch(filters=['topic=="/test/count"'])
        reader = asyncio.create_task(read())
        async with asyncio.timeout(PATIENCE):
            while not watch.token:  # it begins there
                await asyncio.sleep(0.01)
        for number in range(20):
            if number == 10:
                os.kill(node.pids()["nats-server"], signal.SIGKILL)
            await _publish(acting, number)
        async with asyncio.timeout(PATIENCE):
            await reader
        await watch.aclose()
    assert seen == list(range(20))


async def test_an_end_while_the_bus_is_down_is_told_once_and_with_its_time(
    node: Node, namespace: str, busybox_ref: str
) -> None:
    """The supervisor stands still, so that nobody starts nats-server again before the container has ended."""
    node.run("run", "-d", "-n", namespace, "--name", "ends", busybox_ref, "sleep", "1000")
    (row,) = node.json("ps", "-n", namespace)
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        token = (await client.events.stream()).token
        supervisor, bus = node.pid, node.pids()["nats-server"]
        os.kill(supervisor, signal.SIGSTOP)
        try:
            os.kill(bus, signal.SIGKILL)
            before = datetime.now(UTC)
            os.kill(row["pid"], signal.SIGKILL)
            async with asyncio.timeout(PATIENCE):
                while (await client.tasks.get("ends")).status != "stopped":  # it is on record, and the event with it
                    await asyncio.sleep(0.01)
            back = datetime.now(UTC)
        finally:
            os.kill(supervisor, signal.SIGCONT)
        async with client.watch(token=token, filters=['topic=="/tasks/exit"']) as watch, asyncio.timeout(PATIENCE):
            exit = await anext(watch)
        assert exit.event["exit_status"] == 137 and before <= exit.timestamp <= back
        assert datetime.fromisoformat(exit.event["exited_at"]) <= back
        told = [e async for e in client.watch(token=token, filters=['topic=="/tasks/exit"'], follow=False)]
        assert [e.id for e in told] == [exit.id]
    node.run("rm", "-f", "-n", namespace, "ends")


def test_the_command_line_goes_on_from_its_place(node: Node, namespace: str, tmp_path: Path) -> None:
    place = str(tmp_path / "place")

    def events(*options: str) -> list[str]:
        said = node.run("events", "-n", namespace, "--no-follow", "--format", "json", *options).stdout
        return [json.loads(line)["event"]["name"] for line in said.splitlines()]

    node.run("ns", "create", namespace)
    assert events("--place-file", place) == [namespace]
    assert events("--place-file", place) == []
    node.run("ns", "label", namespace, "a=b")
    assert events("--place-file", place, "--filter", 'topic=="/namespaces/delete"') == []
    assert events("--place-file", place) == [namespace]
    assert len(events("--since", "1h", "--until", "2000-01-01T00:00:00Z")) == 0
    assert len(events("--since", "1h", "--filter", 'topic~="^/namespaces/"')) == 2


def test_the_place_is_kept_before_anything_is_printed(node: Node, namespace: str, tmp_path: Path) -> None:
    """What happens between two runs is told by the second, also where the first had nothing to tell."""
    place = tmp_path / "place"
    watching = subprocess.Popen([WHERRY, "events", "-n", namespace, "--place-file", str(place)], env=node.environment)
    try:
        eventually(place.exists, "there is no place yet")
    finally:
        watching.kill()
        watching.wait()
    node.run("ns", "create", namespace)
    told = node.run("events", "-n", namespace, "--no-follow", "--place-file", str(place)).stdout
    assert "/namespaces/create" in told and len(told.splitlines()) == 1
    empty = ("events", "-n", f"{namespace}-2", "--no-follow", "--place-file", str(tmp_path / "empty"))
    assert not node.run(*empty).stdout
    node.run("ns", "create", f"{namespace}-2")
    assert "/namespaces/create" in node.run(*empty).stdout


def test_what_can_keep_no_place(node: Node, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "words").write_text("somewhere")
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    nowhere = [tmp_path / name for name in ("not there/place", "bytes", "words", "null")]
    for bad in (tmp_path, *nowhere):
        done = node.run("events", "--no-follow", "--place-file", str(bad), check=False)
        assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
        assert "wherry: invalid argument: " in done.stderr
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


async def _publish(client: wherry.Client, number: int) -> None:
    for _ in range(200):
        try:
            with context.use(key=f"{client.namespace}-{number}"):  # tried twice, it is one event
                await client.events.publish("/test/count", {"number": number})
        except WherryError:
            await asyncio.sleep(0.05)
        else:
            return
    raise AssertionError("the bus does not come back")
