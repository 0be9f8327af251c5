"""The command line against a real node: what a newcomer types, and what it says when that cannot be done."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from node import WHERRY, Node, eventually
from wherry.cli.app import make
from wherry.cli.events import parse_since
from wherry_shared.errors import InvalidArgument

Run = subprocess.CompletedProcess[str]


@pytest.fixture
def ns(namespace: str) -> list[str]:
    return ["-n", namespace]


@pytest.fixture
def pulled(node: Node, ns: list[str], busybox_ref: str) -> str:
    node.run("pull", *ns, busybox_ref)
    return busybox_ref


def test_pull_prints_plain_lines_where_there_is_no_terminal(node: Node, ns: list[str], busybox_ref: str) -> None:
    done = node.run("pull", *ns, busybox_ref)
    assert busybox_ref in done.stdout and "sha256:" in done.stdout
    assert "unpacked" in done.stderr and "\x1b" not in done.stderr
    assert [i["name"] for i in node.json("images", *ns)] == [busybox_ref]
    again = node.run("pull", *ns, busybox_ref)
    assert "exists" in again.stderr and "downloaded" not in again.stderr


def test_pull_of_what_is_not_there(node: Node, ns: list[str], busybox_ref: str) -> None:
    done = node.run("pull", *ns, busybox_ref.replace("busybox", "nobody"), check=False)
    assert done.returncode == 1
    assert "not found" in done.stderr and "nobody" in done.stderr


def test_run_gives_output_and_exit_code(node: Node, ns: list[str], pulled: str) -> None:
    done = node.run("run", *ns, "--rm", pulled, "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert node.json("ps", *ns, "-a") == []
    assert [s for s in node.json("snapshot", "ls", *ns) if s["kind"] == "active"] == []


def test_run_pulls_what_is_missing(node: Node, ns: list[str], busybox_ref: str) -> None:
    assert node.run("run", *ns, "--rm", busybox_ref, "echo", "hello").stdout == "hello\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["/nonexistent"], 127), (["nonexistent"], 127), (["/etc/passwd"], 126), (["/etc"], 126)],
)
@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_run_tells_dockers_codes(
    node: Node, ns: list[str], pulled: str, arguments: list[str], code: int, runtime: str
) -> None:
    done = node.run("run", *ns, "--rm", "--runtime", runtime, pulled, *arguments, check=False)
    assert done.returncode == code, done.stderr
    (said,) = done.stderr.splitlines()  # once: what the runtime wrote itself is nobody's output
    assert said.startswith("wherry: ") and arguments[0] in said
    assert node.json("ps", *ns, "-a") == []


@pytest.mark.parametrize("verb", ["run", "create", "exec"])
def test_a_flag_that_is_none_is_125(node: Node, verb: str) -> None:
    done = node.run(verb, "--nonesuch", "x", "true", check=False)
    assert done.returncode == 125 and "--nonesuch" in done.stderr
    assert node.run("ps", "--nonesuch", check=False).returncode == 2


def every_verb(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            yield from every_verb(command.get_command(None, name), *path, name)


def test_every_flag_means_one_thing_and_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    wherry = make()
    for path, command in every_verb(wherry):
        flags = [flag for each in command.params for flag in (*each.opts, *each.secondary_opts)]
        assert len(flags) == len(set(flags)), (path, sorted(flags))
        with pytest.raises(SystemExit) as ended:
            wherry([*path, "--help"], prog_name="wherry")
        assert ended.value.code == 0, path
        shown = "".join(capsys.readouterr().out.split())
        for each in command.params:
            words = "".join((each.help or "").split())[:12]
            assert words in shown and (each.opts[0] in shown or each.param_type_name == "argument"), (path, each.name)


def test_run_with_an_unknown_runtime_is_125(node: Node, ns: list[str], pulled: str) -> None:
    done = node.run("run", *ns, "--rm", "--runtime", "nosuch", pulled, "true", check=False)
    assert done.returncode == 125 and "nosuch" in done.stderr
    assert node.json("ps", *ns, "-a") == []


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_run_with_each_runtime(node: Node, ns: list[str], pulled: str, runtime: str) -> None:
    assert node.run("run", *ns, "--rm", "--runtime", runtime, pulled, "hostname").returncode == 0


def test_run_as_a_user_in_a_directory_with_environment(node: Node, ns: list[str], pulled: str) -> None:
    script = "id -u; id -g; pwd; echo $GREETING"
    done = node.run("run", *ns, "--rm", "-u", "12:34", "-w", "/tmp", "-e", "GREETING=hi", pulled, "sh", "-c", script)
    assert done.stdout.split() == ["12", "34", "/tmp", "hi"]


@pytest.mark.parametrize("options", [["-w", "/proc/self/fd/8"], ["-u", "4294967296:0"], ["-u", "nobody-here"]])
def test_run_refuses_what_would_escape(node: Node, ns: list[str], pulled: str, options: list[str]) -> None:
    done = node.run("run", *ns, "--rm", *options, pulled, "true", check=False)
    assert done.returncode == 125
    assert node.json("ps", *ns, "-a") == [] and node.json("snapshot", "ls", *ns, "kind==active") == []


def test_run_carries_stdin(node: Node, ns: list[str], pulled: str) -> None:
    done = node.run("run", *ns, "--rm", "-i", pulled, "sh", "-c", "cat; echo end", input="one\ntwo\n")
    assert done.stdout == "one\ntwo\nend\n"


def test_run_gives_a_terminal(node: Node, ns: list[str], pulled: str) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [WHERRY, "run", *ns, "--rm", "-it", pulled, "sh", "-c", "tty; stty size; read line; echo got:$line"],
        stdin=follower, stdout=follower, stderr=follower, env=node.environment, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    said = b""
    while b"/dev/" not in said:
        said += os.read(leader, 4096)
    os.write(leader, b"hello\r")
    while b"got:hello" not in said:
        said += os.read(leader, 4096)
    assert process.wait(60) == 0
    os.close(leader)


def test_a_signal_goes_through_to_the_process(node: Node, ns: list[str], pulled: str) -> None:
    script = "trap 'echo caught; exit 3' TERM; echo up; while :; do sleep 0.1; done"
    process = subprocess.Popen(
        [WHERRY, "run", *ns, "--rm", pulled, "sh", "-c", script], stdout=subprocess.PIPE, text=True,
        env=node.environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == "caught\n"
    assert process.wait(60) == 3


def test_interrupting_twice_ends_what_ignores_it(node: Node, ns: list[str], pulled: str) -> None:
    process = subprocess.Popen(
        [WHERRY, "run", *ns, "--rm", pulled, "sh", "-c", "echo up; exec sleep 1000"], stdout=subprocess.PIPE,
        text=True, env=node.environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    eventually(lambda: node.json("ps", *ns), "it ended at the first interrupt")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 137
    assert node.json("ps", *ns, "-a") == [] and node.json("snapshot", "ls", *ns, "kind==active") == []


def test_what_its_command_line_left_is_removed(node: Node, ns: list[str], pulled: str) -> None:
    """`run --rm` in the foreground, killed: by the node then, some time after the end."""
    with subprocess.Popen(
        [WHERRY, "run", *ns, "--rm", "--name", "left", pulled, "sh", "-c", "echo up; exec sleep 1000"],
        stdout=subprocess.PIPE, env={**node.environment, "WHERRY_WARM": "0"},
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.kill()
    assert [row["status"] for row in node.json("ps", *ns)] == ["running"]
    assert "--rm" in node.run("restart", *ns, "left", check=False).stderr
    node.run("kill", *ns, "left")
    eventually(lambda: not node.json("ps", *ns, "-a"), "it stays")
    assert node.json("snapshot", "ls", *ns, "kind==active") == []


def test_detached_life(node: Node, ns: list[str], pulled: str) -> None:
    name = node.run("run", *ns, "-d", "--name", "sleeper", pulled, "sleep", "1000").stdout.strip()
    assert name == "sleeper"
    (row,) = node.json("ps", *ns)
    assert row["id"] == "sleeper" and row["status"] == "running" and os.path.exists(f"/proc/{row['pid']}")
    assert node.run("exec", *ns, "sleeper", "echo", "inside").stdout == "inside\n"
    assert node.run("exec", *ns, "sleeper", "sh", "-c", "exit 9", check=False).returncode == 9
    missing = node.run("exec", *ns, "sleeper", "/nonexistent", check=False)
    assert missing.returncode == 127 and len(missing.stderr.splitlines()) == 1
    refused = node.run("rm", *ns, "sleeper", check=False)
    assert refused.returncode == 1 and "running" in refused.stderr
    twice = node.run("run", *ns, "-d", "--name", "sleeper", pulled, "true", check=False)
    assert twice.returncode == 125 and "sleeper" in twice.stderr
    node.run("kill", *ns, "-s", "KILL", "sleeper")
    eventually(lambda: node.json("ps", *ns, "-a")[0]["status"] == "stopped (137)", "it does not stop")
    node.run("rm", *ns, "sleeper")
    assert node.json("ps", *ns, "-a") == []
    assert not os.path.exists(f"/proc/{row['pid']}")


def test_a_name_is_one_containers(node: Node, ns: list[str], pulled: str) -> None:
    for name in ("one", "two"):
        node.run("create", *ns, "--name", name, pulled, "true")
    node.run("rename", *ns, "one", "uno")
    node.run("rename", *ns, "uno", "uno")
    assert {row["id"]: row["name"] for row in node.json("ps", *ns, "-a")} == {"one": "uno", "two": "two"}
    for verb in (["rename", *ns, "two", "uno"], ["rename", *ns, "two", "one"], ["rename", *ns, "uno", "two"]):
        refused = node.run(*verb, check=False)
        assert refused.returncode == 1 and f"the name '{verb[-1]}' is taken by container" in refused.stderr
    for name in ("uno", "one", "two"):
        refused = node.run("run", *ns, "--name", name, pulled, "true", check=False)
        assert refused.returncode == 125 and f"the name '{name}' is taken by container" in refused.stderr
    node.run("rename", *ns, "uno", "one")
    assert {row["name"] for row in node.json("ps", *ns, "-a")} == {"one", "two"}
    node.run("rm", *ns, "one", "two")


def test_rm_force_of_a_running_one(node: Node, ns: list[str], pulled: str) -> None:
    node.run("run", *ns, "-d", "--name", "s", pulled, "sleep", "1000")
    node.run("rm", *ns, "-f", "s")
    assert node.json("ps", *ns, "-a") == [] and node.json("snapshot", "ls", *ns, "kind==active") == []


@pytest.mark.parametrize("verb", [["kill"], ["rm"], ["exec"]])
def test_what_is_not_there_is_named(node: Node, ns: list[str], verb: list[str]) -> None:
    done = node.run(*verb, *ns, "nobody", *(["true"] if verb == ["exec"] else []), check=False)
    assert done.returncode in (1, 125) and "nobody" in done.stderr and "Traceback" not in done.stderr


def test_invalid_identifiers_are_refused(node: Node, pulled: str) -> None:
    for namespace in ("a b", "*", "a..b", "x" * 77, ">"):
        done = node.run("ps", "-n", namespace, check=False)
        assert (done.returncode == 1 and "not valid" in done.stderr) or "longer" in done.stderr, namespace


def test_events_since(node: Node, ns: list[str], pulled: str) -> None:
    node.run("run", *ns, "--rm", "--name", "one", pulled, "true")
    lines = node.run("events", *ns, "--since", "5m", "--no-follow", "--format", "json").stdout.splitlines()
    topics = [json.loads(line)["topic"] for line in lines]
    wanted = ["/content/create", "/snapshot/commit", "/images/create", "/containers/create", "/tasks/create",
              "/tasks/start", "/tasks/exit", "/tasks/delete", "/containers/delete"]  # fmt: skip
    positions = [topics.index(topic) for topic in wanted]
    assert positions == sorted(positions), topics
    assert topics.count("/tasks/exit") == 1
    filtered = node.run("events", *ns, "--since", "5m", "--no-follow", "--filter", "topic~=^/tasks/").stdout
    assert "/tasks/start" in filtered and "/content/create" not in filtered


@pytest.mark.parametrize(
    "text", ["0001-01-01", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "²s", "9999999d", "1h30", "m"]
)
def test_what_is_no_time_is_said(text: str) -> None:
    with pytest.raises(InvalidArgument, match="neither like 10m"):
        parse_since(text)


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("1m500ms", 60.5)])
def test_a_time_ago(text: str, seconds: float) -> None:
    """As Docker takes it; a number of nine digits and more is a time of Unix."""
    before = datetime.now(UTC)
    assert before <= parse_since(text) + timedelta(seconds=seconds) <= datetime.now(UTC)
    assert parse_since("1700000000.5") == datetime(2023, 11, 14, 22, 13, 20, 500000, UTC)


def test_info_names_ten_services(node: Node) -> None:
    told = node.json("info")
    assert sorted(s["name"] for s in told["services"]) == [
        "container", "content", "diff", "events", "image", "introspection", "lease", "namespace", "snapshot", "task",
    ]  # fmt: skip
    assert len({s["pid"] for s in told["services"]}) == 10
    assert {p["id"] for p in told["plugins"]} >= {"overlay", "native", "crun", "runc"}


def test_content(node: Node, ns: list[str], pulled: str) -> None:
    target = node.json("images", *ns)[0]["digest"]
    rows = {row["digest"]: row for row in node.json("content", "ls", *ns)}
    manifest = node.run("content", "get", *ns, target).stdout
    assert rows[target]["size"] == len(manifest) and "layers" in json.loads(manifest)
    assert node.json("content", "ingests", *ns) == []
    node.run("content", "rm", *ns, target)
    assert node.run("content", "get", *ns, target, check=False).returncode == 1


def test_snapshots(node: Node, ns: list[str], pulled: str) -> None:
    (top,) = node.json("snapshot", "ls", *ns)
    assert top["kind"] == "committed"
    assert node.json("snapshot", "usage", *ns, top["name"])["size"] > 0
    done = node.run("snapshot", "mounts", *ns, top["name"], check=False)
    assert done.returncode == 1 and "failed precondition" in done.stderr


def test_namespaces(node: Node, namespace: str, busybox_ref: str) -> None:
    node.run("ns", "create", namespace, "team=red")
    assert {"name": namespace, "labels": {"team": "red"}} in node.json("ns", "ls")
    node.run("ns", "label", namespace, "team=", "floor=2")
    assert {"name": namespace, "labels": {"floor": "2"}} in node.json("ns", "ls")
    node.run("pull", "-n", namespace, busybox_ref)
    refused = node.run("ns", "rm", namespace, check=False)
    assert refused.returncode == 1 and "images" in refused.stderr
    assert node.json("images", "-n", "somebody-else") == []


def test_version_and_help_need_no_node() -> None:
    environment = {**os.environ, "WHERRY_STATE": "/nonexistent"}
    told = subprocess.run([WHERRY, "version"], capture_output=True, text=True, env=environment, check=True)
    assert told.stdout.startswith("wherry ")
    helped = subprocess.run([WHERRY, "--help"], capture_output=True, text=True, env=environment, check=True)
    assert "events" in helped.stdout
    lost = subprocess.run([WHERRY, "ps"], capture_output=True, text=True, env=environment, check=False)
    assert lost.returncode == 1 and "wherry up" in lost.stderr
