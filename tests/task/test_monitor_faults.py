"""What dies in the middle: clients, zygotes, monitors; and many things at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # for monitor_rig.py

from monitor_rig import PYTHON, RUNTIMES, Client, Refused, Rig, alive, eventually, kill, monitor_of
from wherry_task.monitor import zygote

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not RUNTIMES, reason="takes root and an OCI runtime")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()
    assert rig.leftovers() == []


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- clients that go ------------------------------------------------------------------------------------------------


def test_an_exit_while_nobody_was_connected_is_told_once(rig: Rig, runtime: str) -> None:
    # The last exec says who it is, and the init ends when that has been buried: it would take along one that lives.
    until = "until [ -s /tmp/go ]; do sleep 0.05; done; while kill -0 $(cat /tmp/go); do sleep 0.05; done; exit 42"
    client, path = rig.run(runtime, ["sh", "-c", until], change=_tmp)
    rig.exec(client, path, "first", ["sh", "-c", "exit 1"])
    seen = client.notice()
    assert (seen["id"], seen["seq"]) == ("first", 1)
    rig.exec(client, path, "second", ["sh", "-c", "echo $$ > /tmp/go; exit 2"])
    client.close()
    eventually(lambda: (path / "exits/init").exists())
    client = Client(path)
    client.call("watch", after=seen["seq"])
    told = [client.notice(), client.notice()]
    assert [(each["id"], each["exit_status"]) for each in told] == [("second", 2), ("", 42)]
    assert client.call("state")["seq"] == 3 and client.notices == []
    again = Client(path)
    again.call("watch", after=3)
    assert again.call("state")["state"] == "stopped" and again.notices == []
    rig.finish(client)


def test_a_killed_client_costs_the_container_nothing(rig: Rig, runtime: str) -> None:
    container = f"c{uuid.uuid4().hex[:8]}"
    waiting = "trap 'exit 17' TERM; echo ready; while :; do sleep 0.05; done"
    path = rig.bundle(container, rig.spec(container, ["sh", "-c", waiting]))
    out = rig.fifo()
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import json, time, monitor_rig as m\n"
        "c = m.Client(Path(sys.argv[2]), 'zygote.sock'); c.call('spawn', **json.loads(sys.argv[3])); c.call('watch')\n"
        "c.call('create', mounts=json.loads(sys.argv[4]), stdout=sys.argv[5])\n"
        "c.call('start'); print('on', flush=True); time.sleep(99)"
    )
    arguments = [str(rig.base), json.dumps(rig.about(path, runtime)), json.dumps(rig.mounts()), str(out)]
    doomed = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent), *arguments], stdout=subprocess.PIPE
    )
    assert doomed.stdout is not None and doomed.stdout.readline() == b"on\n"
    rig.wait_ready(reader)
    doomed.kill()
    doomed.wait()
    doomed.stdout.close()
    client = Client(path)
    client.call("watch")
    assert client.call("state")["state"] == "running" and client.notices == []
    client.call("kill", signal=15)
    assert client.notice()["exit_status"] == 17
    assert rig.finish(client)["exit_status"] == 17 and client.notices == []


def test_a_client_that_goes_during_its_request(rig: Rig, runtime: str) -> None:
    container = f"c{uuid.uuid4().hex[:8]}"
    path = rig.bundle(container, rig.spec(container, ["sleep", "60"]))
    client = rig.zygote()
    client.send("spawn", **rig.about(path, runtime))
    client.send("create", mounts=rig.mounts())
    client.send("start")
    client.sock.shutdown(socket.SHUT_WR)
    client.close()

    def settled() -> str:
        try:
            return str(Client(path).call("state")["state"])
        except OSError:
            return "none"

    # Either it was noticed before the create, and nobody is left to make anything, or the whole of it was done.
    eventually(lambda: settled() == "running" or not rig.zygote().call("ping")["children"])
    if settled() == "running":
        rig.finish(Client(path))


def test_a_monitor_without_a_container_goes_with_its_last_client(rig: Rig) -> None:
    container = f"c{uuid.uuid4().hex[:8]}"
    path = rig.bundle(container, rig.spec(container, ["true"]))
    client = rig.spawn(path, RUNTIMES[0])
    monitor = monitor_of(client)
    other = Client(path)
    client.close()
    assert other.call("state")["state"] == "empty"
    other.close()
    eventually(lambda: not alive(monitor))


def test_a_client_that_reads_nothing_hinders_nobody(rig: Rig) -> None:
    client, path = rig.run(RUNTIMES[0], ["sleep", "60"])
    deaf = Client(path)
    deaf.sock.setblocking(False)
    body = json.dumps({"id": 1, "op": "wait", "exec_id": "x" * 60_000}).encode()
    frame = len(body).to_bytes(4, "big") + body
    try:
        for _ in range(2000):
            deaf.sock.send(frame)
    except BlockingIOError:
        pass
    assert client.call("state")["state"] == "running"
    rig.exec(client, path, "e", ["true"])
    assert client.call("wait", exec_id="e")["exit_status"] == 0
    rig.finish(client)


# -- zygotes that go ------------------------------------------------------------------------------------------------


def test_monitors_outlive_their_zygote(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sleep", "60"])
    kill(rig.zygote_pid)
    eventually(lambda: not alive(rig.zygote_pid))
    fresh = rig.start_zygote()
    assert fresh == rig.zygote_pid
    rig.exec(client, path, "e", ["sh", "-c", "exit 6"])
    assert client.call("wait", exec_id="e")["exit_status"] == 6
    other, _ = rig.run(runtime, ["true"])
    assert other.call("wait")["exit_status"] == 0
    rig.finish(other)
    client.call("kill", signal=9)
    assert client.call("wait")["exit_status"] == 137
    rig.finish(client)


def test_zygotes_stand_side_by_side_but_not_on_one_socket(rig: Rig) -> None:
    with pytest.raises(RuntimeError, match="another zygote serves"):
        rig.start_zygote()
    other = rig.start_zygote("other.sock")
    assert rig.zygote("other.sock").call("ping")["pid"] == other
    rig.zygote("other.sock").call("quit")
    eventually(lambda: not alive(other))
    assert not (rig.base / "other.sock").exists()
    assert rig.zygote().call("ping")["pid"] == rig.zygote_pid


def test_a_zygote_wants_a_directory_of_its_own(rig: Rig, tmp_path: Path) -> None:
    public = tmp_path / "public"
    public.mkdir()
    os.chmod(public, 0o755)
    command = [PYTHON, "-I", "-S", "-E", str(zygote.__file__), str(public / "z.sock")]
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=30)
    assert done.returncode == 1 and b"0700" in done.stderr


def test_the_zygote_keeps_no_children_and_no_sockets_are_abstract(rig: Rig) -> None:
    client, _ = rig.run(RUNTIMES[0], ["true"])
    client.call("wait")
    rig.finish(client)
    eventually(lambda: rig.zygote().call("ping")["children"] == [])
    assert not [line for line in Path("/proc/net/unix").read_text().splitlines() if "@" in line and "wherry" in line]
    fds = os.listdir(f"/proc/{rig.zygote_pid}/fd")
    for _ in range(10):
        rig.zygote().call("ping")
    eventually(lambda: len(os.listdir(f"/proc/{rig.zygote_pid}/fd")) <= len(fds))


# -- monitors that go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paused", [False, True])
def test_after_a_killed_monitor_nothing_is_left(rig: Rig, runtime: str, paused: bool) -> None:
    client, path = rig.run(runtime, ["sh", "-c", "sleep 64 & sleep 65"])
    rig.exec(client, path, "e", ["sleep", "66"])
    init = int(client.call("state")["pid"])
    if paused:
        client.call("pause")
    kill(monitor_of(client))
    with pytest.raises((EOFError, ConnectionError)):
        client.call("state")
    if not paused:
        eventually(lambda: not alive(init))
    gone = rig.zygote().call("cleanup", **rig.about(path, runtime))
    [end] = gone["exits"]
    assert (end["id"], end["pid"], end["exit_status"], end["shim_died"]) == ("", init, 137, True)
    assert gone["warnings"] == []
    assert not alive(init) and rig.leftovers() == []
    assert not (rig.base / "runtimes" / runtime / path.name).exists()
    assert rig.zygote().call("cleanup", **rig.about(path, runtime))["exits"] == gone["exits"]


def test_an_exit_on_record_outlives_its_monitor(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sh", "-c", "exit 33"])
    assert client.notice()["exit_status"] == 33
    kill(monitor_of(client))
    eventually(lambda: not _answers(path))
    [end] = rig.zygote().call("cleanup", **rig.about(path, runtime))["exits"]
    assert end["exit_status"] == 33 and "shim_died" not in end


def test_a_monitor_and_its_zygote_gone_leave_a_cleaner_enough(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sleep", "67"])
    state = client.call("state")
    kill(rig.zygote_pid)
    eventually(lambda: not alive(rig.zygote_pid))
    kill(state["monitor"])
    eventually(lambda: not alive(state["monitor"]))
    assert alive(state["pid"]), "nobody was there to kill it"
    rig.start_zygote()
    [end] = rig.zygote().call("cleanup", **rig.about(path, runtime))["exits"]
    assert end["shim_died"] is True
    eventually(lambda: not alive(state["pid"]))
    assert rig.leftovers() == []


def test_a_monitor_killed_while_it_creates(rig: Rig, runtime: str) -> None:
    for delay in (0.0, 0.005, 0.01, 0.02, 0.04):
        container = f"c{uuid.uuid4().hex[:8]}"
        path = rig.bundle(container, rig.spec(container, ["sleep", "68"]))
        client = rig.spawn(path, runtime)
        monitor = monitor_of(client)
        client.send("create", mounts=rig.mounts())
        time.sleep(delay)
        kill(monitor)
        eventually(lambda: rig.zygote().call("ping")["children"] == [])
        assert rig.zygote().call("cleanup", **rig.about(path, runtime))["warnings"] == []
        assert rig.leftovers() == []
        assert not (rig.base / "runtimes" / runtime / container).exists()


def test_a_bundle_in_which_nothing_was_done_can_be_cleaned(rig: Rig) -> None:
    container = f"c{uuid.uuid4().hex[:8]}"
    path = rig.bundle(container, rig.spec(container, ["true"]))
    assert rig.zygote().call("cleanup", **rig.about(path, RUNTIMES[0]))["exits"] == []
    with pytest.raises(Refused) as refused:
        rig.zygote().call("cleanup", **{**rig.about(path, RUNTIMES[0]), "bundle": str(path / "none")})
    assert refused.value.code == 5


def test_a_terminated_monitor_stays_to_write_down_the_end(rig: Rig, runtime: str) -> None:
    client, path = rig.run_ready(runtime, "trap 'exit 5' USR1; echo ready; while :; do sleep 0.05; done")
    monitor = monitor_of(client)
    kill(monitor, signal.SIGTERM)
    assert client.call("state")["state"] == "running"
    client.call("kill", signal=10)
    assert client.notice()["exit_status"] == 5
    eventually(lambda: not alive(monitor))
    assert json.loads((path / "exits/init").read_text())["exit_status"] == 5
    rig.zygote().call("cleanup", **rig.about(path, runtime))


def test_a_full_disk_does_not_keep_an_exit_from_being_told(rig: Rig) -> None:
    client, path = rig.run_ready(RUNTIMES[0], "trap 'exit 8' TERM; echo ready; while :; do sleep 0.05; done")
    (path / "exits").rmdir()  # stands for a disk that takes no file any more
    client.call("kill", signal=15)
    notice = client.notice()
    assert notice["exit_status"] == 8 and notice["not_durable"]
    assert rig.finish(client)["exit_status"] == 8


# -- many at once ---------------------------------------------------------------------------------------------------


def test_twenty_containers_at_once(rig: Rig, runtime: str) -> None:
    def one(number: int) -> int:
        client, _ = rig.run(runtime, ["sh", "-c", f"exit {number}"])
        status = client.notice()["exit_status"]
        assert rig.finish(client)["exit_status"] == status and client.notices == []
        return int(status)

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(one, range(20))) == list(range(20))


def test_execs_kills_and_questions_at_once(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sleep", "60"])
    statuses: dict[str, int] = {}

    def one(number: int) -> None:
        mine = Client(path)
        name = f"e{number}"
        rig.exec(mine, path, name, ["sh", "-c", f"exit {number}"])
        mine.call("state")
        statuses[name] = mine.call("wait", exec_id=name)["exit_status"]
        mine.call("delete", exec_id=name)
        mine.close()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == {f"e{number}": number for number in range(12)}
    told = [client.notice()["id"] for _ in range(12)]
    assert sorted(told) == sorted(statuses)
    assert client.call("state")["execs"] == {}
    rig.finish(client)


def _answers(path: Path) -> bool:
    try:
        Client(path).close()
    except OSError:
        return False
    return True


def _tmp(spec: dict[str, Any]) -> None:
    spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})


def test_a_killed_container_may_die_before_it_is_thawed(rig: Rig, runtime: str) -> None:
    """As in cgroup v2, where the runtime finds nobody to resume."""
    early = rig.base / f"early-{runtime}" / runtime
    early.parent.mkdir()
    early.write_text(
        f'#!/bin/sh\ncase " $* " in *\' resume \'*) /usr/bin/env {runtime} "$@"; sleep 0.3; exit 1 ;; esac\n'
        f'exec /usr/bin/env {runtime} "$@"\n'
    )
    early.chmod(0o700)
    client, _ = rig.run(str(early), ["sleep", "60"])
    client.call("pause")
    client.call("kill", signal=9)
    assert client.call("wait")["exit_status"] == 137
    assert client.call("state")["state"] == "stopped"
    rig.finish(client)


def test_nobody_has_the_hosts_null_device(rig: Rig, runtime: str) -> None:
    """crun gives it away to the user of an exec, and whoever owns what he has as a stream may close it to all."""
    client, path = rig.run(runtime, ["sleep", "60"])
    pid = int(client.call("state")["pid"])
    execed = rig.exec(client, path, "e", ["sleep", "60"])
    ours = os.stat("/dev/null")
    for each in (pid, execed):
        for fd in range(3):
            found = os.stat(f"/proc/{each}/fd/{fd}")
            assert found.st_rdev == ours.st_rdev
            assert (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino), f"stream {fd} is the host's"
    rig.finish(client)
