"""Arguments up to the kernel's limit, which no request has room for: by the client and the command line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import wherry
from node import WHERRY, Node
from terminals import Terminal
from wherry_shared import streams
from wherry_shared.errors import InvalidArgument, PermissionDenied

# What the kernel was given, counted where it lies.
COUNT = ["sh", "-c", "n=$(wc -c < /proc/$$/cmdline); echo $n", "sh"]
LONG = ["x" * 99_999] * 15
COUNTED = sum(len(each) + 1 for each in [*COUNT, *LONG])
MIB = 1 << 20


@pytest.fixture(params=["on the node", "the bus alone", "tenant"])
async def client(
    request: pytest.FixtureRequest, node: Node, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[wherry.Client]:
    creds = ""
    if request.param == "tenant":
        creds = node.run("auth", "tenant", namespace, "--state", str(node.state)).stdout.strip()
    if request.param != "on the node":
        monkeypatch.setattr(streams, "_open_same", lambda *_: None)
        monkeypatch.setenv("WHERRY_STDIO", "bus")
    here = request.param == "on the node"
    for _ in range(600):
        try:
            made = await wherry.connect(namespace=namespace, state=str(node.state), creds=creds, direct=here)
        except wherry.Unauthenticated:  # nats-server is reading its users again
            await asyncio.sleep(0.1)
        else:
            break
    async with made:
        yield made


@pytest.fixture
async def task(client: wherry.Client, busybox_ref: str) -> AsyncIterator[wherry.Task]:
    image = await client.pull(busybox_ref, unpack=True)
    async with client.new_container("c", image, args=["sleep", "1000"]) as container, container.new_task() as made:
        await made.start()
        yield made


async def large(client: wherry.Client) -> list[str]:
    return [info.digest for info in (await client.content.walk()).items if info.size > MIB]


async def test_a_megabyte_and_a_half(client: wherry.Client, task: wherry.Task, node: Node) -> None:
    before, leases = await large(client), [lease.id for lease in (await client.leases.walk()).items]
    done = await task.run([*COUNT, *LONG])
    assert (done.code, int(done.stdout)) == (0, COUNTED), done.stderr
    done = await task.run(["sh", "-c", "echo $#", "sh", *["ab"] * 150_000], stdin=b"")
    assert (done.code, done.stdout) == (0, b"150000\n"), done.stderr
    with pytest.raises(InvalidArgument, match="argument list too long: it takes 30"):
        await task.exec(["true", *LONG, *LONG])
    # Nothing stays; what was read is collected.
    assert [lease.id for lease in (await client.leases.walk()).items] == leases
    async with asyncio.timeout(60):
        while await large(client) != before:
            await asyncio.sleep(0.1)


async def test_a_long_process_is_judged_as_any(client: wherry.Client, task: wherry.Task) -> None:
    if client.is_admin:
        return
    with pytest.raises(PermissionDenied, match="capabilities"):
        await task.exec([*COUNT, *LONG], privileged=True)
    assert (await client.tasks.walk()).items[0].container_id == "c" and len((await client.tasks.walk()).items) == 1


def test_by_the_command_line(node: Node, namespace: str, busybox_ref: str, tmp_path: Path) -> None:
    ns = ["-n", namespace]
    node.run("run", *ns, "-d", "--name", "c", busybox_ref, "sleep", "1000")
    assert int(node.run("exec", *ns, "c", *COUNT, *LONG).stdout) == COUNTED
    with Terminal([WHERRY, "exec", *ns, "-t", "c", *COUNT, *LONG], node.environment) as terminal:
        terminal.until(str(COUNTED).encode())
        assert terminal.wait() == 0
    (tmp_path / "env").write_text("".join(f"A{n}={'x' * 99_000}\n" for n in range(7)))
    done = node.run("exec", *ns, "--env-file", str(tmp_path / "env"), "c", *COUNT, *LONG, check=False)
    assert done.returncode == 126 and "argument list too long" in done.stderr and "at most 2097152 fit" in done.stderr
    # A container is a record, and those are bounded: that is said with the bound, and nothing stays.
    for size, reason in ((9, "at most 786432 fit"), (13, "exceed the server's limit of 1048576")):
        done = node.run("run", *ns, "--rm", "--name", "big", busybox_ref, "true", *LONG[:size], check=False)
        assert done.returncode == 125 and reason in done.stderr
    assert [row["id"] for row in node.json("ps", *ns, "-a")] == ["c"]
    node.run("rm", *ns, "-f", "c")
