"""Restart policies: what ends is started again, unless somebody wanted it to end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import wherry
from node import WHERRY, Node, eventually


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One of its own: it is taken down and comes up again."""
    with Node(tmp_path_factory.mktemp("restart-node")) as made:
        yield made


@pytest.fixture
def run(node: Node, namespace: str, busybox_ref: str) -> Any:
    """`wherry run -d --restart POLICY IMAGE sh -c SCRIPT`; answers the id."""

    def run(policy: str, script: str) -> str:
        arguments = ["run", "-d", "-n", namespace, "--restart", policy, busybox_ref, "sh", "-c", script]
        return node.run(*arguments).stdout.strip()

    return run


def pid(node: Node, namespace: str, id: str) -> int:
    """Of its init while it runs, else 0."""
    found = [c for c in node.json("ps", "-a", "-n", namespace) if c["id"] == id]
    return int(found[0]["pid"]) if found and found[0]["status"] == "running" else 0


def count(node: Node, namespace: str, id: str) -> int:
    (told,) = node.json("inspect", "-n", namespace, id)
    return int(told["labels"].get("containerd.io/restart.count", 0))


def settled(node: Node, namespace: str, id: str) -> int:
    """How often it was started again, once nothing runs and the next pause would be over by far."""
    before = -1
    while before != (before := count(node, namespace, id)):
        eventually(lambda: not pid(node, namespace, id), "it runs for ever")
        time.sleep(1.0)
    return before


def test_always_means_also_after_success(node: Node, namespace: str, run: Any) -> None:
    id = run("always", "exit 0")
    eventually(lambda: count(node, namespace, id) >= 3, "it is not started again")
    node.run("rm", "-f", "-n", namespace, id)
    assert node.json("ps", "-a", "-n", namespace) == []


def test_a_failure_is_tried_again_so_many_times(node: Node, namespace: str, run: Any) -> None:
    failing = run("on-failure:2", "exit 3")
    eventually(lambda: count(node, namespace, failing) == 2, "it is not tried twice again")
    assert settled(node, namespace, failing) == 2
    assert settled(node, namespace, run("on-failure", "exit 0")) == 0


@pytest.mark.parametrize("verb", ["stop", "kill"])
def test_what_is_stopped_stays_until_it_is_started(node: Node, namespace: str, run: Any, verb: str) -> None:
    id = run("always", "exec sleep 1000")
    node.run(verb, "-n", namespace, id)
    assert settled(node, namespace, id) == 0
    node.run("start", "-n", namespace, id)
    assert pid(node, namespace, id)
    node.run("update", "-n", namespace, "--restart", "no", id)
    node.run("rm", "-f", "-n", namespace, id)


def test_a_policy_that_it_gets_while_it_runs(node: Node, namespace: str, run: Any) -> None:
    id = run("no", "while [ ! -e /gate ]; do sleep 0.02; done; rm /gate; exit 1")
    node.run("update", "-n", namespace, "--restart", "on-failure:1", id)
    node.run("exec", "-n", namespace, id, "touch", "/gate")
    eventually(lambda: count(node, namespace, id) == 1, "it is not started again")
    eventually(lambda: pid(node, namespace, id), "it does not run")
    node.run("rm", "-f", "-n", namespace, id)


def test_ends_while_the_keeper_is_away(node: Node, namespace: str, run: Any) -> None:
    id = run("unless-stopped", "while [ ! -e /gate ]; do sleep 0.02; done")
    with node.standing_still("keeper", signal.SIGKILL):
        node.run("exec", "-n", namespace, id, "touch", "/gate")
        node.run("wait", "-n", namespace, id)
    eventually(lambda: count(node, namespace, id) >= 1, "it is not started again")
    node.run("rm", "-f", "-n", namespace, id)


def test_a_node_that_comes_up_again(node: Node, namespace: str, run: Any) -> None:
    always, unless, failure = (run(p, "exec sleep 1000") for p in ("always", "unless-stopped", "on-failure"))
    stopped = run("unless-stopped", "exec sleep 1000")
    back = run("always", "exec sleep 1000")
    node.run("stop", "-t", "0", "-n", namespace, stopped, back)
    node.stop(signal.SIGINT)
    node.start()
    for id in (always, unless, back):
        eventually(lambda id=id: pid(node, namespace, id), f"{id} does not run")  # type: ignore[misc]
    assert not pid(node, namespace, stopped) and not pid(node, namespace, failure)
    node.run("rm", "-f", "-n", namespace, always, unless, failure, stopped, back)


def test_a_keeper_without_a_node_of_its_own(node: Node, namespace: str, run: Any) -> None:
    """`wherry keep`: what is stopped comes back with the first since a boot, and with no later one."""
    with node.standing_still("keeper"):
        id = run("always", "exec sleep 1000")
        node.run("stop", "-t", "0", "-n", namespace, id)
        with keeping(node):
            eventually(lambda: pid(node, namespace, id), "it does not run")
            os.kill(pid(node, namespace, id), signal.SIGKILL)
            eventually(lambda: count(node, namespace, id) >= 2, "it is not started again")
            eventually(lambda: pid(node, namespace, id), "it does not run again")
        node.run("stop", "-t", "0", "-n", namespace, id)
        with keeping(node):
            assert settled(node, namespace, id) == count(node, namespace, id)
        node.run("rm", "-f", "-n", namespace, id)


def test_a_keeper_where_no_node_is(node: Node, tmp_path: Path) -> None:
    environment = {**node.environment, "WHERRY_STATE": str(tmp_path / "none")}
    done = subprocess.run([WHERRY, "keep"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"wherry: failed precondition: {tmp_path}/none/keeper cannot be made: No such file or directory\n"
    )


@contextmanager
def keeping(node: Node) -> Iterator[None]:
    with subprocess.Popen([WHERRY, "keep"], env=node.environment) as keeper:
        try:
            yield
        finally:
            keeper.terminate()
    assert keeper.returncode == -signal.SIGTERM


def test_a_restart_of_what_nobody_leaves_in_the_background(node: Node, namespace: str, busybox_ref: str) -> None:
    for flags in (["--restart", "always"], ["--restart", "always", "--rm", "-d"], ["-d", "--restart", "sometimes"]):
        done = node.run("run", "-n", namespace, *flags, busybox_ref, "true", check=False)
        assert done.returncode == 125 and "restart" in done.stderr
    assert node.json("ps", "-a", "-n", namespace) == []


def test_one_that_is_started_again_while_it_is_removed(
    node: Node, namespace: str, busybox_ref: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had no task when its removal looked, and one when the record was to go."""
    from wherry.cli import rm

    id = node.run("create", "-n", namespace, busybox_ref, "sleep", "1000").stdout.strip()
    real, tried = wherry.Container.delete, []

    async def delete(container: wherry.Container, **options: Any) -> None:
        tried.append(container.id)
        if len(tried) < 3:
            await container.start()
        await real(container, **options)

    monkeypatch.setattr(wherry.Container, "delete", delete)
    for name, value in node.environment.items():
        monkeypatch.setenv(name, value)
    rm.command([id], force=True, volumes=False, namespace=namespace)
    assert tried == [id] * 3
    assert node.json("ps", "-a", "-n", namespace) == []


async def test_ends_that_a_tenant_makes_up(node: Node, namespace: str, run: Any) -> None:
    """Events of its own namespace are its to publish, whatever they say: others' containers are started again."""
    node.run("auth", "tenant", namespace, "--state", str(node.state))
    own = {**node.environment, "WHERRY_CREDS": str(node.state / "creds" / f"tenant-{namespace}.nk")}
    # At first nats-server is reading its users again.
    eventually(lambda: not node.run("ps", "-n", namespace, env=own, check=False).returncode, "it does not get in")
    keeper = node.pids()["keeper"]
    creds = str(node.state / "creds" / f"tenant-{namespace}.nk")
    async with wherry.connect(state=str(node.state), namespace=namespace, creds=creds) as tenant:
        for event in ({}, {"id": None, "container_id": None}, {"id": [1], "container_id": [1]}, {"container_id": "a"}):
            await tenant.events.publish("/tasks/exit", event)
        for number in range(20):
            await tenant.events.publish("/tasks/exit", {"id": f"a b {number}", "container_id": f"a b {number}"})
    said = len(node.said)
    id = run("always", "exit 0")
    eventually(lambda: count(node, namespace, id) >= 2, "it is not started again")
    assert node.pids()["keeper"] == keeper
    assert not [line for line in node.said[said:] if "a b" in line]
    node.run("rm", "-f", "-n", namespace, id)
