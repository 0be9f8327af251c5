"""A command line that the node's own process runs: the caller cannot tell the difference, but by the clock."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from node import WHERRY, Node, children, eventually


@pytest.fixture
def command(node: Node, namespace: str) -> Any:
    """Starts `wherry ARGUMENTS` and answers the process; all are ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        env = {**node.environment, "WHERRY_NAMESPACE": namespace, **options.pop("env", {})}
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        made = subprocess.Popen([WHERRY, *arguments], text=True, env=env, **options)
        started.append(made)
        return made

    yield start
    for each in started:
        each.kill()
        each.communicate()


def runners(node: Node) -> set[int]:
    """The processes that run command lines now: in a session of their own, as the spare is not."""
    return {pid for pid in children(node.service_pid("cli")) if _session(pid) == pid}


def spares(node: Node) -> set[int]:
    """The process that waits for the next command line, or gets ready to, if there is one."""
    cli = node.service_pid("cli")
    return {pid for pid in children(cli) if _session(pid) == _session(cli)}


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def following(node: Node, command: Any) -> tuple[subprocess.Popen[str], int]:
    """`wherry events`, which stays, and the process that runs it."""
    before = runners(node)
    process = command("events")
    (runner,) = eventually(lambda: runners(node) - before, "nothing runs the command")
    # Before it is told that its command runs there, it would run it itself.
    eventually(lambda: "pidfd" in " ".join(_open(process.pid)), "it is not told that it runs")
    eventually(lambda: "socket" in " ".join(_open(runner)), "it does not follow")
    return process, runner


def _open(pid: int) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("arguments", [["ps", "-a"], ["images"], ["frobnicate"], ["rm", "nobody"], ["run", "--help"]])
def test_as_if_it_ran_here(command: Any, arguments: list[str]) -> None:
    def outcome(**env: str) -> tuple[int, str, str]:
        process = command(*arguments, env=env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    assert outcome() == outcome(WHERRY_WARM="0")


def test_streams_directory_environment_and_exit_code(command: Any, busybox_ref: str, tmp_path: Path) -> None:
    (tmp_path / "some.env").write_text("FROM_FILE=1\n")
    process = command(
        "run", "--rm", "-i", "--env-file", "some.env", "-e", "GIVEN", busybox_ref, "sh", "-c",
        "cat; echo $GIVEN $FROM_FILE >&2; exit 7",
        stdin=subprocess.PIPE, cwd=tmp_path, env={"GIVEN": "mine"},
    )  # fmt: skip
    out, err = process.communicate("typed\n", timeout=60)
    assert (process.returncode, out, err.splitlines()[-1]) == (7, "typed\n", "mine 1")


def test_a_file_it_makes_has_the_callers_umask(node: Node, command: Any, busybox_ref: str, tmp_path: Path) -> None:
    made = tmp_path / "id"
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        process = command("create", "--cidfile", str(made), busybox_ref, "true", umask=mask)
        assert process.wait(60) == 0, process.communicate()
        assert made.stat().st_mode & 0o777 == mode
        made.unlink()


def test_an_interrupt_reaches_it(node: Node, command: Any) -> None:
    process, runner = following(node, command)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    eventually(lambda: not alive(runner), "it goes on")


def test_stopped_and_continued(node: Node, command: Any) -> None:
    process, runner = following(node, command)

    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    process.send_signal(signal.SIGTSTP)
    eventually(lambda: state(runner) == state(process.pid) == "T", "they are not stopped")
    process.send_signal(signal.SIGCONT)
    eventually(lambda: "T" not in (state(runner), state(process.pid)), "they do not go on")
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    eventually(lambda: not alive(runner), "it goes on")


def test_it_ends_with_its_caller(node: Node, command: Any) -> None:
    process, runner = following(node, command)
    process.kill()
    eventually(lambda: not alive(runner), "it goes on")


def test_killed_like_its_command(node: Node, command: Any) -> None:
    process, runner = following(node, command)
    os.kill(runner, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def test_another_installation_runs_it_itself(node: Node, command: Any, tmp_path: Path) -> None:
    import wherry

    assert wherry.__file__ is not None
    copy = tmp_path / "wherry"
    shutil.copytree(Path(wherry.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = runners(node)
    process = command("events", env={"PYTHONPATH": str(tmp_path)})
    eventually(lambda: "eventpoll" in " ".join(_open(process.pid)), "it does not run")
    eventually(lambda: runners(node) <= before, "somebody else runs it")


def test_nobody_else_is_served(node: Node) -> None:
    path = node.state / "cli.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as idle, socket.socket(socket.AF_UNIX) as rubbish:
        idle.connect(str(path))  # says nothing, and holds up nobody
        rubbish.connect(str(path))
        rubbish.sendall(b"\xff" * 64)
        assert node.run("ps").stdout.startswith("ID")
        assert rubbish.recv(16) == b""


def test_a_command_that_is_done_before_its_caller_looks_is_not_run_twice(node: Node, namespace: str) -> None:
    """A loaded machine: the caller's turn comes again when the other end is closed already."""
    program = """
import _socket, select, types
from wherry.cli import main, warm

class Slow(_socket.socket):
    def sendmsg(self, *arguments):
        sent = super().sendmsg(*arguments)
        ended = select.poll()
        ended.register(self, 0)
        ended.poll(20_000)
        return sent

warm._socket = types.SimpleNamespace(**{**vars(_socket), "socket": Slow})
main()
"""
    arguments = ["lease", "create", "-n", namespace]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=node.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and len(done.stdout.split()) == 1, done
    assert [row["id"] for row in node.json("lease", "ls", "-n", namespace)] == done.stdout.split()
    node.run("lease", "delete", "-n", namespace, *done.stdout.split())


def test_one_that_outlives_its_node_does_not_keep_the_next_from_starting(
    tmp_path: Path, busybox_ref: str, command: Any
) -> None:
    with Node(tmp_path) as node:
        arguments = ["run", "-n", "default", "--rm", "--name", "stays", busybox_ref, "sleep", "600"]
        process = command(*arguments, env=node.environment)
        eventually(lambda: [row["status"] for row in node.json("ps")] == ["running"], "it does not run", 60)
        assert runners(node)
        node.stop(signal.SIGTERM)
        node.start()
        assert process.poll() is None
        node.run("kill", "stays")
        assert process.wait(60) == 137


def test_a_node_under_nohup_runs_what_a_hangup_ends(tmp_path: Path, command: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        node = Node(tmp_path).start()
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        process = command("events", env=node.environment)
        eventually(lambda: runners(node), "nothing runs the command")
        eventually(lambda: "pidfd" in " ".join(_open(process.pid)), "it is not told that it runs")
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == -signal.SIGHUP
    finally:
        node.stop()


def test_a_spare_becomes_the_next_command(node: Node, command: Any) -> None:
    def becomes() -> bool:
        node.run("ps")
        spare = eventually(lambda: spares(node), "none is forked ahead")
        process, runner = following(node, command)
        process.terminate()
        process.wait(20)
        return runner in spare  # unless it was not ready yet

    assert eventually(becomes, "none is ever used", 60)


def test_a_spare_that_was_killed_is_not_missed(node: Node) -> None:
    node.run("ps")
    for pid in eventually(lambda: spares(node), "none is forked ahead"):
        os.kill(pid, signal.SIGKILL)
    assert node.run("ps").stdout.startswith("ID")


def test_a_spare_goes_with_its_node(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        node.run("ps")
        spare = eventually(lambda: spares(node), "none is forked ahead")
        node.kill("cli")
        eventually(lambda: not any(alive(pid) for pid in spare), "it waits for nobody")
