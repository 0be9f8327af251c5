"""Nodes side by side, on top of each other, taken down, and brought up again around living containers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from images import Registry
from node import WHERRY, Node, children, clean_environment, eventually


def descendants(pid: int) -> set[int]:
    found = set(children(pid))
    return found.union(*(descendants(child) for child in found))


def test_a_second_node_on_the_same_root_is_refused(node: Node) -> None:
    done = subprocess.run(
        [WHERRY, "up", "--root", node.root, "--state", node.state], capture_output=True, text=True, timeout=60,
        env=clean_environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "already runs" in done.stderr and str(node.root) in done.stderr
    assert len(node.services()) == 10


def test_a_bus_that_has_not_ended_keeps_the_next_node_off_its_store(tmp_path: Path) -> None:
    """Two nats-servers would write the same files."""
    with Node(tmp_path) as made:
        bus, services = made.pids()["nats-server"], list(made.pids().values())
        os.kill(bus, signal.SIGSTOP)
        made.stop(signal.SIGKILL)
    command = [WHERRY, "up", "--root", made.root, "--state", made.state]
    try:
        services.remove(bus)
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in services), "the services do not end", 40)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1 and "has not ended yet" in done.stderr
    finally:
        os.kill(bus, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{bus}").exists(), "the bus does not end")
    with made:
        assert len(made.services()) == 10


def test_a_bus_that_cannot_come_back_is_started_until_it_can(tmp_path: Path) -> None:
    """Containers and services are not taken down for it."""
    with Node(tmp_path) as made:
        port = int(json.loads((made.state / "node.json").read_text())["nats"].rpartition(":")[2])
        os.kill(made.pid, signal.SIGSTOP)
        os.kill(made.pids()["nats-server"], signal.SIGKILL)
        listener = eventually(lambda: _listening(port), "the port is not free")
        os.kill(made.pid, signal.SIGCONT)
        eventually(lambda: sum("nats-server ended" in line for line in made.said) >= 3, "it is not tried again")
        listener.close()
        eventually(lambda: len(made.services()) == 10, "the bus does not come back", 40)
        assert sum("nats-server ended" in line for line in made.said) < 20


def test_clients_come_back_to_a_node_that_was_started_again(tmp_path: Path) -> None:
    """Its port is that of before, if nobody has it meanwhile; nobody was told of another."""
    made = Node(tmp_path)

    def port() -> int:
        return int(json.loads((made.state / "node.json").read_text())["nats"].rpartition(":")[2])

    with made:
        first = port()
        with (tmp_path / "told").open("wb") as told:
            arguments = [WHERRY, "events", "--all-namespaces"]
            watching = subprocess.Popen(arguments, env=made.environment, stdout=told, stderr=told)
        try:
            # Nothing says from when on it watches: something is told until it has heard of it.
            eventually(lambda: made.run("ns", "create", "a") and made.run("ns", "rm", "a") and _has(told.name), "mute")
            for number in (signal.SIGTERM, signal.SIGKILL):
                services = [*made.pids().values()]
                made.stop(number)
                eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in services), "they live on", 40)  # noqa: B023
                made.start()
                assert port() == first
                made.run("ns", "create", f"after-{number}")
                eventually(lambda: f"after-{number}" in Path(told.name).read_text(), "it does not come back", 40)  # noqa: B023
        finally:
            watching.kill()
            watching.wait()
        made.stop(signal.SIGTERM)
        listener = eventually(lambda: _listening(first), "the port is not free")
        try:
            with made:
                assert port() != first and len(made.services()) == 10
        finally:
            listener.close()


def _has(path: str) -> bool:
    return "/namespaces/" in Path(path).read_text()


def _listening(port: int) -> socket.socket | None:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(("127.0.0.1", port))
    except OSError:
        made.close()
        return None
    made.listen()
    return made


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--log-level", "loud", "there is no log level 'LOUD'"),
        ("--port", "99999", "--port 99999 is not between 0 and 65535"),
        ("--port", "-1", "--port -1 is not between 0 and 65535"),
        ("--nats", "here:4222", "--nats 'here:4222' is not like nats://host:port"),
        ("--nats", "nats://a,nats://b:x", "--nats 'nats://b:x' is not like nats://host:port"),
    ],
)
def test_what_no_service_can_do_anything_with(tmp_path: Path, flag: str, value: str, said: str) -> None:
    """It is for all services, so it is refused once, and nothing is made."""
    done = subprocess.run(
        [WHERRY, "up", "--root", tmp_path / "root", "--state", tmp_path / "state", flag, value],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"wherry up: {said}"
    assert not any(tmp_path.iterdir())


def test_a_root_that_can_be_none(tmp_path: Path) -> None:
    (tmp_path / "read-only").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path / "read-only"], check=True)
    (tmp_path / "file").touch()
    try:
        for root in (tmp_path / "file", tmp_path / "read-only", tmp_path / "read-only" / "root"):
            done = subprocess.run(
                [WHERRY, "up", "--root", root, "--state", tmp_path / "state"],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode == 1
            assert str(root) in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr
    finally:
        subprocess.run(["umount", tmp_path / "read-only"], check=True)


def test_two_nodes_do_not_disturb_each_other(node: Node, busybox_ref: str, namespace: str, tmp_path: Path) -> None:
    with Node(tmp_path, "--node", "other") as other:
        for each in (node, other):
            each.run("run", "-n", namespace, "-d", "--name", "same", busybox_ref, "sleep", "1000")
        mine, theirs = (each.json("ps", "-n", namespace)[0]["pid"] for each in (node, other))
        assert mine != theirs
        other.run("rm", "-n", namespace, "-f", "same")
        assert other.json("ps", "-n", namespace, "-a") == []
        assert node.json("ps", "-n", namespace)[0]["pid"] == mine
    assert node.run("exec", "-n", namespace, "same", "echo", "alive").stdout == "alive\n"
    node.run("rm", "-n", namespace, "-f", "same")


def test_ctrl_c_takes_everything_down(busybox_ref: str, tmp_path: Path) -> None:
    with Node(tmp_path) as made:
        made.run("run", "-d", "--name", "a", busybox_ref, "sleep", "1000")
        made.run("run", "-d", "--name", "b", "--runtime", "runc", busybox_ref, "sleep", "1000")
        inits = [row["pid"] for row in made.json("ps")]
        everything = descendants(made.pid)
        groups = [line for line in Path(f"/proc/{inits[0]}/cgroup").read_text().splitlines() if "/wherry-" in line]
        assert made.stop(signal.SIGINT) == 0
    everything.update(inits)
    eventually(lambda: not [pid for pid in everything if os.path.exists(f"/proc/{pid}")], f"alive: {everything}")
    assert made.mounts() == []
    path = groups[0].rpartition(":")[2]
    for hierarchy in Path("/sys/fs/cgroup").iterdir():
        assert not (hierarchy / path.lstrip("/")).parent.exists()
    assert not left_of(made)


def left_of(node: Node) -> list[str]:
    """Command lines of processes that mention the node's directories."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(node.state) in line:
                found.append(line)
    return found


def test_containers_outlive_their_node(busybox_ref: str, tmp_path: Path) -> None:
    with Node(tmp_path) as made:
        made.run("run", "-d", "--name", "stays", busybox_ref, "sleep", "1000")
        gate = "while [ ! -e /gate ]; do sleep 0.1; done; exit 5"
        made.run("run", "-d", "--name", "ends", busybox_ref, "sh", "-c", gate)
        pid = {row["id"]: row["pid"] for row in made.json("ps")}
        assert made.stop(signal.SIGTERM) == 0
    assert os.path.exists(f"/proc/{pid['stays']}")
    Path(f"/proc/{pid['ends']}/root/gate").touch()
    eventually(lambda: not os.path.exists(f"/proc/{pid['ends']}"), "it does not end")
    with made:
        rows = {row["id"]: row for row in made.json("ps", "-a")}
        assert rows["stays"]["status"] == "running" and rows["stays"]["pid"] == pid["stays"]
        assert rows["ends"]["status"] == "stopped (5)"
        events = made.run("events", "--since", "5m", "--no-follow", "--filter", 'topic=="/tasks/exit"').stdout
        assert events.count('"container_id": "ends"') == 1
        assert made.run("exec", "stays", "echo", "here").stdout == "here\n"
        made.run("rm", "ends")
    assert not os.path.exists(f"/proc/{pid['stays']}")


def test_content_scaled(registry: Registry, busybox_ref: str, tmp_path: Path) -> None:
    with Node(tmp_path, "--scale", "content=3") as made:
        assert [s["name"] for s in made.services()].count("content") == 3
        for _ in range(3):
            assert made.run("run", "--rm", busybox_ref, "echo", "hi").stdout == "hi\n"
        assert len({row["digest"] for row in made.json("content", "ls")}) == 3


def test_unprivileged_services(busybox_ref: str, tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        if directory == Path("/tmp"):
            break
        directory.chmod(0o755)  # pytest makes these for us alone
    with Node(tmp_path) as made:  # by root alone, first: what it made then changes hands
        made.run("run", "--rm", busybox_ref, "true")
        (made.root / "image/elsewhere").symlink_to(tmp_path / "mine")
        (tmp_path / "mine").touch()
        os.link(tmp_path / "mine", made.root / "image/another")
    with Node(tmp_path, "--user", "nobody") as made:
        assert (tmp_path / "mine").stat().st_uid == 0
        assert made.json("images")
        uids = {name: os.stat(f"/proc/{made.service_pid(name)}").st_uid for name in ("content", "image", "task")}
        assert uids["content"] == uids["image"] == 65534 and uids["task"] == 0
        assert made.run("run", "--rm", busybox_ref, "echo", "hi").stdout == "hi\n"
    with Node(tmp_path) as made:  # and back
        assert made.json("images") and len(made.services()) == 10
        assert made.run("run", "--rm", busybox_ref, "echo", "hi").stdout == "hi\n"
        owned = [made.state / "creds", *(made.state / "creds").iterdir(), *(made.root / "image").iterdir()]
        assert {path: path.stat().st_uid for path in owned if path.stat().st_uid} == {}
        assert not any(path.stat().st_mode & 0o077 for path in owned if path.is_relative_to(made.state))
