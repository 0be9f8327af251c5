"""`wherry up --together`: several services in one process, each as it is in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from images import Registry
from node import SERVICES, WHERRY, Node, clean_environment, eventually


def pids_of(node: Node) -> dict[str, int]:
    return {service["name"]: service["pid"] for service in node.services()}


def test_all_that_may_share_a_process(registry: Registry, busybox_ref: str, tmp_path: Path) -> None:
    with Node(tmp_path, "--together", "all") as made:
        pids = pids_of(made)
        assert set(pids) == set(SERVICES)
        assert len(set(pids.values())) == 2, "diff has its own"
        assert sorted(made.pids()) == ["cli", "diff", "nats-server", "together"]
        assert made.run("run", "--rm", busybox_ref, "echo", "hi").stdout == "hi\n"
        made.run("lease", "create", "l1")
        topics = made.run("events", "--since", "5m", "--no-follow").stdout
        assert topics.count("/tasks/exit") == 1
        assert made.run("doctor", check=False).returncode == 0


def test_it_dies_and_comes_back(busybox_ref: str, tmp_path: Path) -> None:
    with Node(tmp_path, "--together", "all") as made:
        made.run("run", "-d", "--name", "stays", busybox_ref, "sleep", "1000")
        made.run("run", "-d", "--name", "ends", busybox_ref, "sh", "-c", "sleep 1; exit 5")
        made.run("run", "-d", "--name", "again", "--restart", "always", busybox_ref, "sleep", "1000")
        first = {row["id"]: row["pid"] for row in made.json("ps")}
        old = made.kill("together")
        os.kill(first["again"], signal.SIGKILL)  # the keeper is in that process
        made.wait_restarted("task", old)
        assert len(set(pids_of(made).values())) == 2

        def rows() -> dict[str, dict[str, object]]:
            return {row["id"]: row for row in made.json("ps", "-a")}

        eventually(lambda: rows()["ends"]["status"] == "stopped (5)", "its end is not told")
        eventually(lambda: rows()["again"]["pid"] not in (0, None, first["again"]), "it is not started again")
        assert rows()["stays"]["pid"] == first["stays"]
        events = made.run("events", "--since", "5m", "--no-follow", "--filter", 'topic=="/tasks/exit"').stdout
        assert events.count('"container_id": "ends"') == 1


def test_containers_outlive_it(busybox_ref: str, tmp_path: Path) -> None:
    with Node(tmp_path, "--together", "all") as made:
        made.run("run", "-d", "--name", "stays", busybox_ref, "sleep", "1000")
        pid = made.json("ps")[0]["pid"]
        assert made.stop(signal.SIGTERM) == 0
    assert os.path.exists(f"/proc/{pid}")
    with Node(tmp_path) as apart:  # nothing that is kept knows of it
        assert apart.json("ps")[0]["pid"] == pid
        assert len(set(pids_of(apart).values())) == len(SERVICES)
    assert not os.path.exists(f"/proc/{pid}")


def test_rights_are_not_shared(busybox_ref: str, tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        if directory == Path("/tmp"):
            break
        directory.chmod(0o755)  # pytest makes these for us alone
    with Node(tmp_path, "--user", "nobody", "--together", "all") as made:
        pids = pids_of(made)
        assert pids["snapshot"] == pids["task"] != pids["image"] == pids["content"]
        uids = {name: os.stat(f"/proc/{pids[name]}").st_uid for name in ("image", "task")}
        assert uids == {"image": 65534, "task": 0}
        assert made.run("run", "--rm", busybox_ref, "echo", "hi").stdout == "hi\n"


def test_some(tmp_path: Path) -> None:
    with Node(tmp_path, "--together", "image,lease") as made:
        pids = pids_of(made)
        assert pids["image"] == pids["lease"]
        assert len(set(pids.values())) == len(SERVICES) - 1
        assert "keeper" in made.pids()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(("--together", "image,diff"), "diff"), (("--together", "image,imgae"), "imgae"),
     (("--together", "all", "--scale", "content=2"), "content")],
)  # fmt: skip
def test_what_cannot_be(arguments: tuple[str, ...], name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [WHERRY, "up", "--root", tmp_path / "root", "--state", tmp_path / "state", *arguments], capture_output=True,
        text=True, timeout=60, env=clean_environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"cannot share a process: {name}" in done.stderr
