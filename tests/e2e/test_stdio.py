"""Streams of containers for a client that has nothing of the node but the bus: no shared directory, no FIFO."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import wherry
from node import WHERRY, Node, clean_environment, eventually
from terminals import Terminal, descriptors
from wherry.client import walk
from wherry.stdio import Stdio
from wherry_shared.errors import FailedPrecondition


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One of its own: its services and its bus are killed here."""
    with Node(tmp_path_factory.mktemp("stdio-node")) as made:
        yield made


class Afar:
    """The command line on a host that only reaches the bus."""

    def __init__(self, node: Node, nowhere: Path, namespace: str) -> None:
        self.node = node
        self.nowhere = nowhere
        known = json.loads((node.state / "node.json").read_text())
        self.where = {"nats": known["nats"], "node": known["node"], "creds": str(node.state / "creds" / "admin.nk")}
        self.environment = {
            **clean_environment(), "WHERRY_STATE": str(nowhere), "WHERRY_NAMESPACE": namespace,
            "WHERRY_NATS": known["nats"], "WHERRY_NODE": known["node"], "WHERRY_CREDS": self.where["creds"],
        }  # fmt: skip

    def run(self, *arguments: str, check: bool = True, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            [WHERRY, *arguments], env=self.environment, input=input, capture_output=True, timeout=90, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{arguments}: {done.returncode}\n{done.stdout!r}\n{done.stderr!r}")
        return done

    def connected(self) -> AbstractAsyncContextManager[wherry.Client]:
        return wherry.connect(
            namespace=self.environment["WHERRY_NAMESPACE"], state=str(self.nowhere), **self.where
        )  # fmt: skip

    def terminal(self, *arguments: str, size: tuple[int, int] = (80, 24)) -> Terminal:
        return Terminal([WHERRY, *arguments], self.environment, size=size)

    def popen(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [WHERRY, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )  # fmt: skip


@pytest.fixture
def afar(node: Node, tmp_path: Path, namespace: str, busybox_ref: str) -> Iterator[Afar]:
    made = Afar(node, tmp_path, namespace)
    made.run("pull", busybox_ref)
    yield made
    ids = [row["id"] for row in json.loads(made.run("ps", "-a", "--format", "json").stdout)]
    if ids:
        made.run("rm", "-f", *ids)


def test_run_and_exec(afar: Afar, busybox_ref: str) -> None:
    done = afar.run("run", "--rm", busybox_ref, "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    text = bytes(range(256)) * 2000
    assert afar.run("run", "--rm", "-i", busybox_ref, "cat", input=text).stdout == text
    afar.run("run", "-d", "--name", "c", busybox_ref, "sleep", "1000")
    assert (
        afar.run("exec", "-i", "c", "sha256sum", input=text).stdout.split()[0].decode()
        == hashlib.sha256(text).hexdigest()
    )
    assert afar.run("exec", "c", "sh", "-c", "exit 5", check=False).returncode == 5
    missing = afar.run("exec", "c", "/nonexistent", check=False)
    assert missing.returncode == 127 and len(missing.stderr.splitlines()) == 1
    assert not list(afar.nowhere.iterdir())


@pytest.mark.parametrize("where", ["afar", "on the node"])
def test_a_terminal_is_left_joined_and_ended(afar: Afar, busybox_ref: str, where: str) -> None:
    if where != "afar":
        afar.environment = {**afar.node.environment, "WHERRY_NAMESPACE": afar.environment["WHERRY_NAMESPACE"]}
    with afar.terminal("run", "-it", "--name", "c", busybox_ref, "sh", size=(91, 17)) as first:
        first.until(b"# ")
        assert first.is_raw
        first.type(b"stty size\n")
        first.until(b"17 91")
        first.resize(101, 33)
        first.process.send_signal(signal.SIGWINCH)
        eventually(lambda: b"33 101" in _asked(first, b"stty size\n"), "the size does not follow")
        first.type(b"x=remem; x=${x}bered\n\x10\x11")
        assert first.wait() == 0 and first.is_as_before
    with afar.terminal("attach", "c") as second, afar.terminal("attach", "--detach-keys", "ctrl-a,d", "c") as third:
        eventually(lambda: second.is_raw and third.is_raw, "they do not attach")
        eventually(lambda: b"remembered" in _asked(second, b"echo $x\n"), "the second does not attach")
        third.until(b"remembered")
        third.type(b"echo fr''om-third\n")
        second.until(b"from-third")
        third.type(b"\x01d")
        assert third.wait() == 0 and third.is_as_before
        second.type(b"exit 9\n")
        assert second.wait() == 9 and second.is_as_before
    assert b"cannot attach to a stopped container" in afar.run("attach", "c", check=False).stderr


def _asked(terminal: Terminal, question: bytes) -> bytes:
    """What comes in answer to a command, up to a prompt behind it."""
    terminal.type(question + b"echo -n do''ne\n")
    return terminal.until(b"done")


def test_exec_on_a_terminal(afar: Afar, busybox_ref: str) -> None:
    afar.run("run", "-d", "--name", "c", busybox_ref, "sleep", "1000")
    with afar.terminal("exec", "-it", "c", "sh", size=(70, 20)) as shell:
        shell.until(b"# ")
        shell.type(b"sh -c 'stty size; sleep 1000'\n")  # one process group: an interrupt between the two ends both
        shell.until(b"20 70")
        shell.type(b"\x03")  # an interrupt is for the foreground there, and not for us
        shell.until(b"# ")  # it takes with it what was typed before it is seen
        shell.type(b"exit 4\n")
        assert shell.wait() == 4 and shell.is_as_before
    with afar.terminal("exec", "-it", "c", "sh") as shell:
        shell.until(b"# ")
        shell.process.terminate()
        assert shell.wait() == 143 and shell.is_as_before


def test_an_interactive_container_in_the_background(afar: Afar, busybox_ref: str) -> None:
    """It logs, and whoever attaches sees what is written from then on, a prompt without a line's end too."""
    afar.run("run", "-dit", "--name", "c", "--log-opt", "max-size=8k", "--log-opt", "max-file=2", busybox_ref, "sh")
    with afar.terminal("attach", "c") as shell:
        eventually(lambda: shell.is_raw, "it does not attach")
        assert b"42" in _asked(shell, b"echo $((6*7))\n")
        assert b"42" in afar.run("logs", "c").stdout
        assert b"1000\r" in _asked(shell, b"seq 1000\n")
        shell.type(b"\x10\x11")
        assert shell.wait() == 0
    files = list((afar.node.root / "task/logs" / afar.environment["WHERRY_NAMESPACE"] / "c").glob("log*"))
    assert len(files) == 2 and all(file.stat().st_size <= 8192 for file in files)


def test_what_is_removed_when_it_ends(afar: Afar, busybox_ref: str) -> None:
    """`run -d --rm`, and `run -it --rm` that was left: by the node, whatever becomes of its service meanwhile."""
    gate = "while [ ! -e /gate ]; do sleep 0.1; done"
    for name, waiting in (("quick", gate), ("slow", gate), ("other", "sleep 1000")):
        script = f"echo {name}; {waiting}; echo end"
        afar.run("run", "-d", "--rm", "--name", name, busybox_ref, "sh", "-c", script)
    with afar.terminal("run", "-it", "--rm", "--name", "left", busybox_ref, "sh") as shell:
        shell.until(b"# ")
        shell.type(b"\x10\x11")
        assert shell.wait() == 0
    pids = _running(afar)
    following = afar.popen("logs", "-f", "quick")
    assert following.stdout is not None and following.stdout.readline() == b"quick\n"
    Path(f"/proc/{pids['quick']}/root/gate").touch()
    assert following.stdout.read() == b"end\n" and following.wait(60) == 0
    eventually(lambda: "quick" not in _running(afar), "quick stays")
    assert b"--rm" in afar.run("restart", "other", check=False).stderr
    with afar.node.standing_still("task", signal.SIGKILL):
        Path(f"/proc/{pids['slow']}/root/gate").touch()
        eventually(lambda: not Path(f"/proc/{pids['slow']}").exists(), "slow does not end")
    with afar.terminal("attach", "left") as shell:
        eventually(lambda: shell.is_raw, "it does not attach")
        shell.type(b"exit 3\n")
        assert shell.wait() == 3
    afar.run("stop", "-t", "0", "other")
    eventually(lambda: not _left(afar), f"{_left(afar)} stay")
    afar.run("run", "-d", "--rm", "--name", "quick", busybox_ref, "sleep", "1000")
    afar.run("rm", "-f", "quick")
    assert not _left(afar)
    assert b"--restart" in afar.run("run", "-d", "--rm", "--restart", "always", busybox_ref, check=False).stderr


def test_a_tenant_from_afar(afar: Afar, busybox_ref: str) -> None:
    namespace = afar.environment["WHERRY_NAMESPACE"]
    creds = afar.node.run("auth", "tenant", namespace, "--state", str(afar.node.state)).stdout.strip()
    admin, afar.environment = afar.environment, {**afar.environment, "WHERRY_CREDS": creds}
    # At first nats-server is reading its users again.
    eventually(lambda: afar.run("ps", check=False).returncode == 0, "the tenant does not get in")
    afar.run("run", "-dit", "--rm", "--name", "c", busybox_ref, "sh")
    assert afar.run("exec", "-i", "c", "tr", "a-z", "A-Z", input=b"text").stdout == b"TEXT"
    following = afar.popen("logs", "-f", "c")
    assert following.stdout is not None and following.stdout.read(1)  # the prompt: it follows
    with afar.terminal("attach", "c") as shell:
        assert b"42" in _asked(shell, b"echo $((6*7))\n")
        shell.type(b"exit 6\n")
        assert shell.wait() == 6
    assert b"42" in following.stdout.read() and following.wait(60) == 0
    afar.environment = admin
    eventually(lambda: not _left(afar), f"{_left(afar)} stay")


def _running(afar: Afar) -> dict[str, int]:
    """The pids of what runs."""

    async def look() -> dict[str, int]:
        async with afar.connected() as client:
            return {task.container_id: task.pid for task in await walk(client.tasks.walk)}

    return asyncio.run(look())


def _left(afar: Afar) -> list[str]:
    """The containers, and the snapshots of containers."""

    async def look() -> list[str]:
        async with afar.connected() as client:
            containers = await walk(client.containers.walk, [])
            snapshots = await walk(client.snapshots.walk, [], snapshotter=await client.default_snapshotter())
            return [*(each.id for each in containers), *(each.name for each in snapshots if each.kind != "committed")]

    return asyncio.run(look())


def test_a_log_goes_on_while_the_task_service_is_dead(afar: Afar, busybox_ref: str) -> None:
    """threats 7: what is written meanwhile is there, each line once, and whoever follows goes on."""
    script = "i=0; until [ -e /gate ]; do i=$((i+1)); echo $i; usleep 10000; done"
    afar.run("run", "-d", "--name", "c", busybox_ref, "sh", "-c", script)
    pid = _running(afar)["c"]
    following = afar.popen("logs", "-f", "c")
    assert following.stdout is not None and following.stdout.readline() == b"1\n"
    log = afar.node.root / "task/logs" / afar.environment["WHERRY_NAMESPACE"] / "c/log"
    with afar.node.standing_still("task", signal.SIGKILL):
        size = log.stat().st_size
        eventually(lambda: log.stat().st_size > size + 4000, "nothing is logged meanwhile", 60)
        Path(f"/proc/{pid}/root/gate").touch()
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "it does not end")
    rest = following.stdout.read().split()
    assert following.wait(60) == 0 and len(rest) > 50
    assert rest == [b"%d" % number for number in range(2, len(rest) + 2)]
    assert afar.run("logs", "c").stdout.split() == [b"1", *rest]


def test_logs(afar: Afar, busybox_ref: str) -> None:
    script = "for i in 1 2 3 4 5 6; do echo line $i; echo error $i >&2; sleep 0.1; done; sleep 0.5; printf end"
    afar.run("run", "-d", "--name", "c", busybox_ref, "sh", "-c", script)
    followed = afar.run("logs", "-f", "c")
    assert followed.stdout == b"".join(b"line %d\n" % i for i in range(1, 7)) + b"end"
    assert followed.stderr == b"".join(b"error %d\n" % i for i in range(1, 7))
    assert afar.run("logs", "--tail", "1", "c").stdout == b"end"
    stamped = afar.run("logs", "-t", "c").stdout.splitlines()
    stamp = stamped[3].split(b" ")[0].decode()[:22] + "0000Z"  # a bit before it, and long behind the line before
    assert afar.run("logs", "--since", stamp, "c").stdout.startswith(b"line 4\n")
    assert afar.run("logs", "--until", stamp, "c").stdout == b"line 1\nline 2\nline 3\n"
    assert afar.run("logs", "--since", "1h", "c").stdout == followed.stdout
    afar.run("start", "c")
    eventually(lambda: afar.run("logs", "c").stdout.count(b"end") == 2, "the second run is not logged behind the first")
    afar.run("rm", "-f", "c")
    assert b"not found" in afar.run("logs", "c", check=False).stderr


@pytest.mark.parametrize("hurt", ["nothing", "task", "nats-server"])
def test_a_hundred_megabytes(afar: Afar, busybox_ref: str, hurt: str) -> None:
    """Every byte once and in order, whatever goes away for a moment meanwhile."""
    size = 100_000_000 if hurt == "nothing" else 40_000_000
    script = f"head -c {size} /dev/urandom > /tmp/x; sha256sum /tmp/x >&2; cat /tmp/x; rm /tmp/x"
    reading = subprocess.Popen(
        [WHERRY, "run", "--rm", "--tmpfs", "/tmp", busybox_ref, "sh", "-c", script], env=afar.environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert reading.stdout is not None and reading.stderr is not None
    told: list[bytes] = []
    listening = threading.Thread(target=lambda: told.append(reading.stderr.read()))  # type: ignore[union-attr]
    listening.start()
    digest, got = hashlib.sha256(), 0
    while data := reading.stdout.read(1 << 16):
        if hurt != "nothing" and got < size // 4 <= got + len(data):
            afar.node.kill(hurt)
        got += len(data)
        digest.update(data)
    assert reading.wait(60) == 0
    listening.join()
    assert got == size and told[0].split()[0].decode() == digest.hexdigest()


def test_a_terminal_survives_the_bus(afar: Afar, busybox_ref: str) -> None:
    with afar.terminal("run", "-it", "--rm", busybox_ref, "cat") as shell:
        eventually(lambda: shell.is_raw, "it does not start")
        shell.type(b"before\n")
        shell.until(b"before\r\nbefore\r\n")
        afar.node.kill("nats-server")
        shell.type(b"during\n")
        shell.until(b"during\r\nduring\r\n")
        afar.node.kill("task")
        shell.type(b"after\n")
        assert shell.until(b"after\r\nafter\r\n").count(b"during") == 0
        shell.type(b"\x04")
        assert shell.wait() == 0 and shell.is_as_before


async def test_logs_are_followed_across_rotations(afar: Afar, namespace: str, busybox_ref: str) -> None:
    async with afar.connected() as client:
        image = await client.image(busybox_ref)
        script = "for i in $(seq 1 100); do seq 1 50; sleep 0.005; done"
        async with client.new_container("c", image, args=["sh", "-c", script]) as container:
            async with container.new_task(stdio=Stdio.logged(options="max_size=20000&max_files=50")) as task:
                await task.start()
                lines = [line async for line in container.logs(follow=True)]
                assert [int(line.text) for line in lines] == list(range(1, 51)) * 100
                assert lines == sorted(lines, key=lambda line: line.stamp)
                assert (await task.wait()).code == 0
            last = [line.text async for line in container.logs(tail=3)]
            assert last == [b"48", b"49", b"50"]


async def test_a_collected_output_is_capped(afar: Afar, namespace: str, busybox_ref: str) -> None:
    async with afar.connected() as client:
        image = await client.image(busybox_ref)
        making = client.new_container("c", image, args=["sleep", "1000"])
        async with making as container, container.new_task() as task:
            await task.start()
            done = await task.run(["head", "-c", "40000000", "/dev/zero"])
            assert done.truncated and len(done.stdout) == 16 << 20
            assert (await task.run(["cat"], stdin=b"x" * 300_000)).stdout == b"x" * 300_000
            with pytest.raises(FailedPrecondition, match="nowhere"):
                await task.attach(Stdio.output())


def test_clients_that_vanish(afar: Afar, busybox_ref: str) -> None:
    """Their processes end, and nothing of them stays in the service."""
    afar.run("run", "-d", "--name", "c", busybox_ref, "sleep", "1000")
    pid = afar.node.service_pid("task")
    before = descriptors(pid)
    terminals = [afar.terminal("exec", "-it", "c", "sh", "-c", "echo he''re; sleep 2") for _ in range(6)]
    most = 0
    for terminal in terminals:
        terminal.until(b"here")
        most = max(most, descriptors(pid))
        terminal.process.kill()
    for terminal in terminals:
        terminal.__exit__()
    assert most > before
    eventually(lambda: descriptors(pid) <= before + 2, f"{descriptors(pid)} descriptors, {before} before", 40)


async def test_many_attach_at_once(afar: Afar, namespace: str, busybox_ref: str) -> None:
    """A slow one is waited for; all of them get everything."""
    async with afar.connected() as client:
        image = await client.image(busybox_ref)
        container = await client.new_container("c", image, args=["cat"])
        ours, theirs = os.pipe()
        task = await container.new_task(stdio=Stdio(ours, lambda _: None, remote=True))
        await task.start()
        got: list[list[bytes]] = [[] for _ in range(5)]
        joined = [await container.task() for _ in got]
        for each, parts in zip(joined, got, strict=True):
            await each.attach(Stdio(None, _slowly(parts) if parts is got[0] else parts.append))
        data = hashlib.sha256(b"seed").digest() * 100_000
        with open(theirs, "wb") as pipe:
            await asyncio.to_thread(pipe.write, data)
            await asyncio.to_thread(pipe.close)
        async with asyncio.timeout(60):
            await asyncio.gather(*(each.wait() for each in joined))
        assert [b"".join(parts) == data for parts in got] == [True] * 5
        for each in joined:
            each.detach()
        await task.wait()
        await task.delete()
        os.close(ours)


def _slowly(parts: list[bytes]) -> wherry.stdio.Sink:
    def take(data: bytes) -> None:
        time.sleep(0.01)
        parts.append(data)

    return take
