"""A monitor that was launched holds still, small, until something happens to its container; then it knows all of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from descriptors import descriptors

sys.path.append(str(Path(__file__).parent))  # for monitor_rig.py

from monitor_rig import RUNTIMES, Client, Refused, Rig, alive, eventually, kill, monitor_of
from wherry_task.monitor import runtime as oci
from wherry_task.monitor import warming

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not RUNTIMES, reason="takes root and an OCI runtime")
PRIVATE_KIB = 600


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("quiet"))
    yield rig
    rig.close()
    assert rig.leftovers() == []


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def launch(rig: Rig, runtime: str, args: list[str], **stdio: Any) -> tuple[Client, Path, int]:
    """A created container, as the service makes one, and its init."""
    container = f"c{uuid.uuid4().hex[:8]}"
    path = rig.bundle(container, rig.spec(container, args))
    client = rig.zygote()
    made = client.call("launch", **rig.about(path, runtime), mounts=rig.mounts(), **stdio)
    return client, path, int(made["pid"])


def release(rig: Rig, runtime: str, path: Path, pid: int) -> None:
    """As the service starts a container: without a word to its monitor."""
    assert oci.release(runtime, str(rig.base / "runtimes" / Path(runtime).name / path.name), pid)


def private_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def test_it_is_small(rig: Rig, runtime: str) -> None:
    found = []
    for _ in range(3):  # what its zygote writes to for the first time meanwhile is the monitor's alone, too
        client, path, pid = launch(rig, runtime, ["sleep", "60"], stdout=str(rig.fifo()), stdin=str(rig.fifo()))
        release(rig, runtime, path, pid)
        about = json.loads((path / "monitor.json").read_text())  # a question would wake it
        found.append(private_kib(about["monitor"]["pid"]))
        os.kill(pid, signal.SIGKILL)
        assert client.notice()["exit_status"] == 137
        rig.finish(client)
    assert min(found) < PRIVATE_KIB, found


def test_it_held_still_and_then_does_everything(rig: Rig, runtime: str) -> None:
    client, path, pid = launch(rig, runtime, ["sleep", "60"])
    release(rig, runtime, path, pid)
    other = Client(path)  # nobody has told the monitor that the container runs
    told = other.call("state")
    assert (told["state"], told["pid"]) == ("running", pid)
    with pytest.raises(Refused, match="cannot start a running"):
        other.call("start")
    for op, state in (("pause", "paused"), ("resume", "running")):
        client.call(op)
        assert other.call("state")["state"] == state
    rig.exec(other, path, "e", ["sh", "-c", "exit 4"])
    assert client.notice()["exit_status"] == 4
    rig.finish(client)


def test_an_init_killed_behind_its_back_is_told(rig: Rig, runtime: str) -> None:
    client, path, pid = launch(rig, runtime, ["sleep", "60"])
    os.kill(pid, signal.SIGKILL)
    notice = client.notice()
    assert (notice["pid"], notice["exit_status"]) == (pid, 137)
    assert Client(path).call("state")["state"] == "stopped"
    rig.finish(client)


def test_its_client_goes_and_another_comes(rig: Rig, runtime: str) -> None:
    client, path, pid = launch(rig, runtime, ["sleep", "60"])
    release(rig, runtime, path, pid)
    monitor = monitor_of(client)
    client.close()
    other = Client(path)
    other.call("watch")
    assert other.call("state")["state"] == "running"
    kill(monitor, signal.SIGTERM)  # the machine goes down: it stays for the end
    os.kill(pid, signal.SIGKILL)
    assert other.notice()["exit_status"] == 137
    eventually(lambda: not alive(monitor))
    assert rig.zygote().call("cleanup", **rig.about(path, runtime))["exits"][0]["exit_status"] == 137


def test_a_launch_that_fails_tells_why_and_leaves_nobody(rig: Rig, runtime: str) -> None:
    with pytest.raises(Refused, match="no-such-program"):
        launch(rig, runtime, ["/no-such-program"])
    eventually(lambda: rig.zygote().call("ping")["children"] == [])
    assert rig.leftovers() == []


def test_a_worker_that_waits_keeps_nothing_of_what_it_touched(rig: Rig) -> None:
    before = descriptors()
    warming.warm()
    assert descriptors() - before == set()
    client = rig.zygote()  # and still answers whatever comes
    assert client.call("ping")["version"] == 1


def test_one_forked_ahead_ends_with_its_connection(rig: Rig) -> None:
    ahead = rig.zygote()
    eventually(lambda: len(rig.zygote().call("ping")["children"]) == 1)
    ahead.close()
    eventually(lambda: rig.zygote().call("ping")["children"] == [])


def test_an_ended_container_is_taken_away_before_it_is_deleted(rig: Rig, runtime: str) -> None:
    client, path, pid = launch(rig, runtime, ["sh", "-c", "exit 7"], plain=True)
    state = rig.base / "runtimes" / runtime / path.name
    folders = [folder / path.name for folder in rig.cgroups() if (folder / path.name).is_dir()]
    assert state.is_dir() and folders
    release(rig, runtime, path, pid)
    told = client.notice()
    assert (told["id"], told["exit_status"]) == ("", 7)
    eventually(lambda: not state.exists() and not any(folder.exists() for folder in folders))
    monitor = client.call("state")["monitor"]
    assert str(path) not in Path(f"/proc/{monitor}/mountinfo").read_text()
    assert client.call("state")["state"] == "stopped"
    assert client.call("delete")["exit_status"] == 7
    eventually(lambda: not alive(monitor))
    client.close()


def test_a_monitor_that_dies_after_that_leaves_nothing_to_complain_of(rig: Rig, runtime: str) -> None:
    client, path, pid = launch(rig, runtime, ["sh", "-c", "exit 7"], plain=True)
    folders = [folder / path.name for folder in rig.cgroups() if (folder / path.name).is_dir()]
    release(rig, runtime, path, pid)
    assert client.notice()["exit_status"] == 7
    eventually(lambda: not any(folder.exists() for folder in folders))
    kill(client.call("state")["monitor"], signal.SIGKILL)
    client.close()
    gone = rig.zygote().call("cleanup", **rig.about(path, runtime))
    assert gone["warnings"] == [] and [each["exit_status"] for each in gone["exits"]] == [7]


def test_what_cannot_go_yet_goes_with_the_deletion(rig: Rig, runtime: str) -> None:
    client, path, pid = launch(rig, runtime, ["true"], plain=True)
    folders = [folder / path.name for folder in rig.cgroups() if (folder / path.name).is_dir()]
    busy = next((folder for folder in folders if "/pids/" in str(folder)), folders[0]) / "kept"
    busy.mkdir()
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        (busy / "cgroup.procs").write_text(str(sleeper.pid))
        release(rig, runtime, path, pid)
        assert client.notice()["exit_status"] == 0
        assert client.call("state")["state"] == "stopped"
        assert busy.is_dir()
        sleeper.kill()
    assert client.call("delete")["exit_status"] == 0
    eventually(lambda: not busy.parent.exists())
    client.close()
