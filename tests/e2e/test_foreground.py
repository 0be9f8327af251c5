"""What a command line in the foreground does to, and bears from, whoever is at the other end of its own streams."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from node import WHERRY, Node, eventually
from terminals import Terminal


@pytest.fixture
def running(node: Node, namespace: str, busybox_ref: str) -> Iterator[list[str]]:
    """The first arguments of an exec in a container that runs."""
    node.run("run", "-n", namespace, "-d", "--name", "c", busybox_ref, "sleep", "1000")
    yield ["exec", "-n", namespace, "c"]
    node.run("rm", "-n", namespace, "-f", "c")


@contextlib.contextmanager
def command(node: Node, way: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command line, and the reading end of a pipe that it writes into."""
    ours, theirs = os.pipe()
    environment = {**node.environment, "WHERRY_STDIO": way}
    process = subprocess.Popen([WHERRY, *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=theirs)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


WAYS = pytest.mark.parametrize("way", ["fifo", "bus"])


@WAYS
def test_a_stopped_reader_keeps_nobody_from_interrupting(node: Node, running: list[str], way: str) -> None:
    with command(node, way, *running, "yes") as (process, pipe):
        os.read(pipe, 1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    eventually(lambda: "yes" not in node.run("top", *running[1:]).stdout, "it goes on")


@WAYS
def test_a_reader_that_has_gone_ends_it(node: Node, running: list[str], way: str) -> None:
    """`exec ... | head -1`, of what would never end by itself."""
    with open(os.devnull) as nothing, command(node, way, *running, "yes") as (process, pipe):
        os.read(pipe, 1)
        os.dup2(nothing.fileno(), pipe)  # it is closed
        assert process.wait(60) == 128 + signal.SIGPIPE
    eventually(lambda: "yes" not in node.run("top", *running[1:]).stdout, "it goes on")


def test_a_full_disk_under_our_output(node: Node, running: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = node.run(*running, "echo", "x", check=False, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 125 and "No space left on device" in done.stderr


def test_a_terminal_is_left_as_it_was(node: Node, running: list[str]) -> None:
    """Non-blocking, it would fail whatever runs in it next."""
    with Terminal([WHERRY, running[0], "-it", *running[1:], "true"], node.environment) as terminal:
        assert terminal.process.wait(60) == 0
        assert not fcntl.fcntl(terminal._slave, fcntl.F_GETFL) & os.O_NONBLOCK


def test_a_terminal_that_hangs_up(node: Node, running: list[str], tmp_path: Path) -> None:
    """There is nothing to be put back as it was; somebody's log had a traceback."""
    leader, follower = pty.openpty()
    said = tmp_path / "said"
    line = ["setsid", "-c", WHERRY, running[0], "-it", *running[1:], "sh", "-c", "echo up; sleep 1000"]
    with said.open("w") as errors:
        process = subprocess.Popen(line, env=node.environment, stdin=follower, stdout=follower, stderr=errors)
    os.close(follower)
    try:
        shown = b""
        while b"up" not in shown:
            shown += os.read(leader, 64)
    finally:
        os.close(leader)
    try:
        assert process.wait(30) in (125, 128 + signal.SIGHUP)  # who reads at that very moment gets an error first
    finally:
        process.kill()
    assert "Traceback" not in said.read_text()


def test_a_terminal_takes_no_pipe(node: Node, running: list[str], namespace: str, busybox_ref: str) -> None:
    """It would wait for more for ever."""
    for line in ([running[0], "-it", *running[1:]], ["run", "-n", namespace, "-it", busybox_ref]):
        done = node.run(*line, "cat", check=False, input="all\n", timeout=60)
        assert done.returncode == 125 and "the input is no terminal" in done.stderr
    assert [row["id"] for row in node.json("ps", "-n", namespace, "-a")] == ["c"]


def test_a_cidfile(node: Node, running: list[str], namespace: str, busybox_ref: str, tmp_path: Path) -> None:
    """It is new, or there is no container; and there is none without one."""
    path = tmp_path / "cid"
    create = ["create", "-n", namespace, "--cidfile", str(path)]
    id = node.run(*create, busybox_ref, "true").stdout.strip()
    assert path.read_text() == id
    done = node.run("run", *create[1:], busybox_ref, "true", check=False)
    assert done.returncode == 125 and "File exists" in done.stderr and path.read_text() == id
    node.run("rm", "-n", namespace, id)
    path.unlink()
    assert node.run("run", *create[1:], "--name", "c", busybox_ref, "true", check=False).returncode == 125
    assert not path.exists() and [row["id"] for row in node.json("ps", "-n", namespace, "-a")] == ["c"]


CLOSED = pytest.mark.parametrize("warm", ["0", "1"])


@CLOSED
@pytest.mark.parametrize(
    ("closed", "script", "wanted"),
    [("<&-", "cat; echo e >&2", (b"", b"e\n")), (">&-", "echo o; echo e >&2", (b"", b"e\n")),
     ("2>&-", "echo o; echo e >&2", (b"o\n", b"")), ("<&- >&- 2>&-", "echo o", (b"", b""))],
)  # fmt: skip
def test_closed_descriptors(
    node: Node, running: list[str], closed: str, script: str, wanted: tuple[bytes, bytes], warm: str
) -> None:
    """As some daemons start their children: nothing else may take their numbers."""
    line = [WHERRY, running[0], "-i", *running[1:], "sh", "-c", f"{script}; exit 3"]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *line], env={**node.environment, "WHERRY_WARM": warm},
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (3, *wanted)
