"""The monitor, driven with the real runtimes: lifecycle, streams, execs, signals, limits, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # for monitor_rig.py

from monitor_rig import PYTHON, RUNTIMES, Client, Refused, Rig, alive, eventually, monitor_of, read_all
from wherry_task.monitor import zygote

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not RUNTIMES, reason="takes root and an OCI runtime")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("monitor"))
    yield rig
    rig.close()
    assert rig.leftovers() == []


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- lifecycle ------------------------------------------------------------------------------------------------------


def test_a_container_runs_ends_and_is_deleted(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sh", "-c", "exit 7"], start=False)
    assert client.call("state")["state"] == "created"
    pid = client.call("start")["pid"]
    notice = client.notice()
    assert (notice["notice"], notice["id"], notice["pid"], notice["exit_status"]) == ("exit", "", pid, 7)
    assert notice["oom"] is False
    record = json.loads((path / "exits/init").read_text())
    assert record["exit_status"] == 7 and record["exited_at"] == notice["exited_at"]
    state = client.call("state")
    assert state["state"] == "stopped" and state["exit"]["exit_status"] == 7
    assert client.call("wait")["exit_status"] == 7
    monitor = monitor_of(client)
    assert rig.finish(client)["exit_status"] == 7
    eventually(lambda: not alive(monitor))
    assert not (path / "monitor.sock").exists()
    assert not (rig.base / "runtimes" / runtime / path.name).exists()
    assert rig.leftovers() == []


def test_the_start_is_answered_before_the_exit_is_told(rig: Rig, runtime: str) -> None:
    for _ in range(5):
        client, _ = rig.run(runtime, ["true"], start=False)
        number = client.send("start")
        assert client.receive()["id"] == number
        assert client.notice()["exit_status"] == 0
        rig.finish(client)


def test_frames_sent_at_once_are_done_in_order(rig: Rig, runtime: str) -> None:
    container = f"c{uuid.uuid4().hex[:8]}"
    path = rig.bundle(container, rig.spec(container, ["sh", "-c", "exit 3"]))
    client = rig.zygote()
    numbers = [client.send("spawn", **rig.about(path, runtime)), client.send("create", mounts=rig.mounts())]
    numbers.append(client.send("start"))
    assert len({client.reply(number)["pid"] for number in numbers}) == 2, "the monitor's and the init's, twice"
    assert client.call("wait")["exit_status"] == 3
    rig.finish(client)


def test_a_start_with_poststart_hooks_is_left_to_the_runtime(rig: Rig, runtime: str) -> None:
    mark = rig.base / f"poststart-{runtime}"

    def hook(spec: dict[str, Any]) -> None:
        spec["hooks"] = {"poststart": [{"path": "/bin/touch", "args": ["touch", str(mark)]}]}

    client, _ = rig.run(runtime, ["sleep", "60"], change=hook, poststart=True)
    assert mark.exists()
    rig.finish(client)


def test_the_root_file_system_is_mounted_for_the_container_only(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sleep", "60"])
    pid = client.call("state")["pid"]
    assert os.path.exists(f"/proc/{pid}/root/bin/busybox")
    assert os.listdir(path / "rootfs") == []
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(path) in line]
    rig.finish(client)


def test_an_overlay_of_very_many_layers(rig: Rig) -> None:
    deep = rig.base / "layers-with-a-name-that-is-long-enough-to-pass-a-page"
    layers = [deep / f"{number:03d}" / "fs" for number in range(128)]
    for layer in layers:
        layer.mkdir(parents=True)
    (layers[77] / "here").write_text("x")
    (deep / "up").mkdir()
    (deep / "work").mkdir()
    lower = ":".join([*map(str, layers), str(rig.image)])
    options = [f"lowerdir={lower}", f"upperdir={deep}/up", f"workdir={deep}/work"]
    container = f"c{uuid.uuid4().hex[:8]}"
    path = rig.bundle(container, rig.spec(container, ["ls", "/here"]))
    client = rig.spawn(path, RUNTIMES[0])
    try:
        client.call("create", mounts=[{"type": "overlay", "source": "overlay", "options": options}])
    except Refused as e:
        if "overlay option lowerdir+" not in e.message:
            raise
        pytest.skip("this kernel's overlay takes a page of options: Debian 12's does")
    client.call("start")
    assert client.call("wait")["exit_status"] == 0
    rig.finish(client)


def test_a_bundle_whose_path_is_longer_than_a_socket_address(rig: Rig, runtime: str) -> None:
    folder = rig.base / "bundles" / ("long" * 30)
    path = folder / "c-long"
    path.mkdir(parents=True, mode=0o700)
    (path / "config.json").write_text(json.dumps(rig.spec(f"long-{runtime}", ["cat"], terminal=True)))
    out = rig.fifo()
    client = rig.spawn(path, runtime)
    client.call("create", mounts=rig.mounts(), terminal=True, stdout=str(out))
    client.call("start")
    again = Client(path)
    assert again.call("state")["state"] == "running"
    rig.finish(client)
    os.rename(folder, rig.base / f"done-{runtime}")


# -- streams --------------------------------------------------------------------------------------------------------


def test_output_goes_through_fifos_and_ends(rig: Rig, runtime: str) -> None:
    out, err = rig.fifo(), rig.fifo()
    got: dict[str, bytes] = {}
    readers = [threading.Thread(target=lambda p=p: got.__setitem__(p.name, read_all(p))) for p in (out, err)]
    for reader in readers:
        reader.start()
    client, _ = rig.run(runtime, ["sh", "-c", "echo out; echo err >&2; seq 20000"], stdout=str(out), stderr=str(err))
    for reader in readers:
        reader.join(20)
    assert got[err.name] == b"err\n"
    assert got[out.name].startswith(b"out\n1\n") and got[out.name].endswith(b"\n20000\n")
    assert client.call("wait")["exit_status"] == 0
    rig.finish(client)


def test_a_reader_may_leave_and_another_come(rig: Rig, runtime: str) -> None:
    out = rig.fifo()
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    script = "echo one; while ! [ -e /tmp/go ]; do sleep 0.05; done; echo two; echo three"
    client, _ = rig.run(runtime, ["sh", "-c", script], change=_writable_tmp, stdout=str(out))
    assert eventually(lambda: _read_some(reader)) == b"one\n"
    os.close(reader)
    rig.exec(client, rig.base / "bundles" / client.call("state")["container"], "go", ["sh", "-c", "echo > /tmp/go"])
    again = client.call("wait")
    assert again["exit_status"] == 0, "the container got a SIGPIPE"
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    assert eventually(lambda: _read_some(reader)) == b"two\nthree\n"
    os.close(reader)
    rig.finish(client)


def test_a_fifo_that_nobody_opens_blocks_nothing(rig: Rig, runtime: str) -> None:
    stdin, out, err = rig.fifo(), rig.fifo(), rig.fifo()
    client, _ = rig.run(runtime, ["echo", "hello"], stdin=str(stdin), stdout=str(out), stderr=str(err))
    assert client.call("wait")["exit_status"] == 0
    rig.finish(client)


@pytest.mark.parametrize("copy", [False, True])
def test_stdin_ends_when_it_is_closed_and_not_before(rig: Rig, runtime: str, copy: bool) -> None:
    stdin, out = rig.fifo(), rig.fifo()
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    client, _ = rig.run(runtime, ["cat"], stdin=str(stdin), stdout=str(out), copy=copy)
    for word in (b"first\n", b"second\n"):  # a client that comes, writes and leaves, twice
        with stdin.open("wb") as writer:
            writer.write(word)
        assert eventually(lambda: _read_some(reader)) == word
    assert client.call("state")["state"] == "running"
    client.call("close_stdin")
    assert client.call("wait")["exit_status"] == 0
    assert _read_end(reader) == b""
    os.close(reader)
    rig.finish(client)


def test_a_file_takes_both_streams_and_is_appended_to(rig: Rig, runtime: str) -> None:
    path = rig.base / f"deep-{runtime}" / "down" / "log"
    path.parent.mkdir(parents=True)
    path.write_text("before\n")
    os.chmod(path, 0o640)
    uri = f"file://{path}"
    client, _ = rig.run(runtime, ["sh", "-c", "echo out; echo err >&2"], stdout=uri, stderr=uri)
    client.call("wait")
    rig.finish(client)
    text = path.read_text()
    assert text.startswith("before\n") and sorted(text.split()[1:]) == ["err", "out"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_log_has_time_and_stream_and_is_rotated(rig: Rig, runtime: str) -> None:
    path = rig.base / f"logs-{runtime}" / "c.log"
    uri = f"log://{path}?max_size=20000&max_files=99"
    script = "seq 3000; echo bad >&2; head -c 40000 /dev/zero | tr '\\0' x; printf end"
    client, _ = rig.run(runtime, ["busybox", "sh", "-c", script], stdout=uri, stderr=uri)
    client.call("wait")
    rig.finish(client)
    files = sorted(path.parent.iterdir(), key=lambda each: int(each.suffix[1:]) if each.suffix != ".log" else 0)
    assert len(files) > 8 and all(each.stat().st_size <= 20000 for each in files)
    lines = [line.split(" ", 3) for each in reversed(files) for line in each.read_text().splitlines()]
    assert all(time.endswith("Z") and time[10] == "T" for time, *_ in lines)
    assert [rest for _, *rest in lines if rest[0] == "stderr"] == [["stderr", "F", "bad"]]
    # A line that was unfinished for a moment is in two parts.
    whole = "".join(text + "\n" * (tag == "F") for _, stream, tag, text in lines if stream == "stdout")
    assert whole == "".join(f"{n}\n" for n in range(1, 3001)) + "x" * 40000 + "end"


def test_a_log_keeps_no_more_files_than_it_may(rig: Rig, runtime: str) -> None:
    path = rig.base / f"few-{runtime}" / "c.log"
    client, _ = rig.run(runtime, ["seq", "5000"], stdout=f"log://{path}?max_size=20000&max_files=3")
    client.call("wait")
    rig.finish(client)
    assert sorted(each.name for each in path.parent.iterdir()) == ["c.log", "c.log.1", "c.log.2"]
    assert path.read_text().splitlines()[-1].endswith(" stdout F 5000")


def test_a_terminal_echoes_is_resized_and_ends(rig: Rig, runtime: str) -> None:
    stdin, out = rig.fifo(), rig.fifo()
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    client, _ = rig.run(runtime, ["sh"], terminal=True, stdin=str(stdin), stdout=str(out))
    client.call("resize", width=133, height=44)
    seen = b""
    with stdin.open("wb", buffering=0) as writer:
        writer.write(b"stty size; seq 30000; exit 9\n")
        while b"30000\r\n" not in seen:
            seen += eventually(lambda: _read_some(reader))
    assert b"44 133\r\n" in seen
    assert client.call("wait")["exit_status"] == 9
    _read_end(reader)
    os.close(reader)
    with pytest.raises(Refused) as refused:
        client.call("resize", width=70000, height=1)
    assert refused.value.code == 3
    rig.finish(client)


def test_a_terminal_that_nobody_reads_stops_the_container_not_the_monitor(rig: Rig, runtime: str) -> None:
    out = rig.fifo()
    client, _ = rig.run(runtime, ["yes"], terminal=True, stdout=str(out))
    assert client.call("state")["state"] == "running"
    client.call("kill", signal=9)
    assert client.call("wait")["exit_status"] == 137
    rig.finish(client)


@pytest.mark.parametrize("what", ["directory", "symlink", "absent", "scheme", "relative"])
def test_streams_that_are_no_streams_are_refused(rig: Rig, what: str) -> None:
    link = rig.base / f"link-{uuid.uuid4().hex[:6]}"
    link.symlink_to(rig.fifo())
    uris = {"directory": str(rig.base), "symlink": str(link), "absent": str(rig.base / "absent"),
            "scheme": "binary:///bin/sh", "relative": "file://relative"}  # fmt: skip
    container = f"c{uuid.uuid4().hex[:8]}"
    client = rig.spawn(rig.bundle(container, rig.spec(container, ["true"])), RUNTIMES[0])
    with pytest.raises(Refused) as refused:
        client.call("create", mounts=rig.mounts(), stdout=uris[what])
    assert refused.value.code in (3, 5, 7, 12, 2)
    assert client.call("state")["state"] == "empty"
    client.call("shutdown")


# -- execs ----------------------------------------------------------------------------------------------------------


def test_execs_have_their_own_exits_and_ids(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sleep", "60"])
    pid = rig.exec(client, path, "one", ["sh", "-c", "exit 5"])
    notice = client.notice()
    assert (notice["id"], notice["pid"], notice["exit_status"]) == ("one", pid, 5)
    assert json.loads((path / "exits/exec-one").read_text())["exit_status"] == 5
    with pytest.raises(Refused) as refused:
        rig.exec(client, path, "one", ["true"])
    assert refused.value.code == 6
    assert client.call("delete", exec_id="one")["exit_status"] == 5
    assert not (path / "exits/exec-one").exists()
    rig.exec(client, path, "one", ["true"])
    assert client.call("wait", exec_id="one")["exit_status"] == 0
    rig.exec(client, path, "init", ["sh", "-c", "exit 4"])
    assert client.call("wait", exec_id="init")["exit_status"] == 4
    assert not (path / "exits/init").exists(), "an exec took the init's place"
    with pytest.raises(Refused) as refused:
        client.call("wait", exec_id="unknown")
    assert refused.value.code == 5
    rig.finish(client)


def test_execs_end_before_the_init_is_told_to_have_ended(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sleep", "60"])
    for number in range(4):
        rig.exec(client, path, f"e{number}", ["sleep", "60"])
    client.call("kill", signal=9)
    told = [client.notice()["id"] for _ in range(5)]
    assert sorted(told[:4]) == ["e0", "e1", "e2", "e3"] and told[4] == ""
    rig.finish(client)


def test_an_exec_with_a_terminal_and_one_with_streams(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sleep", "60"])
    out, plain = rig.fifo(), rig.fifo()
    reader, other = (os.open(each, os.O_RDONLY | os.O_NONBLOCK) for each in (out, plain))
    script = 'until [ "$(stty size 2>/dev/null)" = "12 90" ]; do sleep 0.05; done; stty size'
    rig.exec(client, path, "t", ["sh", "-c", script], terminal=True, stdout=str(out))
    client.call("resize", exec_id="t", width=90, height=12)
    rig.exec(client, path, "p", ["echo", "plain"], stdout=str(plain))
    assert client.call("wait", exec_id="t")["exit_status"] == 0
    assert eventually(lambda: _read_some(reader)) == b"12 90\r\n"
    assert eventually(lambda: _read_some(other)) == b"plain\n"
    os.close(reader), os.close(other)
    rig.finish(client)


def test_an_exec_with_arguments_up_to_the_kernels_limit(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sleep", "60"])
    rig.exec(client, path, "huge", ["true", *["x" * 120_000] * 12])
    assert client.call("wait", exec_id="huge")["exit_status"] == 0
    try:  # beyond it a runtime refuses, or the process that it made ends with the error
        rig.exec(client, path, "more", ["true", *["x" * 120_000] * 100])
        assert client.call("wait", exec_id="more")["exit_status"] != 0
    except Refused as refused:
        assert refused.message
    assert client.call("state")["state"] == "running"
    rig.finish(client)


def test_an_exec_that_cannot_be_run_tells_why_and_leaves_nothing(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sleep", "60"])
    before = len(os.listdir(f"/proc/{monitor_of(client)}/fd"))
    for number in range(5):
        with pytest.raises(Refused) as refused:
            rig.exec(client, path, f"bad{number}", ["/no/such/program"])
        assert "no/such/program" in refused.value.message or "No such file" in refused.value.message
    assert client.call("state")["execs"] == {}
    eventually(lambda: len(os.listdir(f"/proc/{monitor_of(client)}/fd")) == before)
    assert not [each for each in os.listdir(path) if each.startswith(("log-", "exec-"))]
    rig.finish(client)


def test_execs_leave_no_descriptors_behind(rig: Rig) -> None:
    client, path = rig.run(RUNTIMES[0], ["sleep", "60"])
    before = len(os.listdir(f"/proc/{monitor_of(client)}/fd"))
    for number in range(10):
        terminal = bool(number % 2)
        rig.exec(client, path, f"e{number}", ["true"], terminal=terminal, stdin=str(rig.fifo()), stdout=str(rig.fifo()))
        client.call("wait", exec_id=f"e{number}")
        client.call("delete", exec_id=f"e{number}")
    eventually(lambda: len(os.listdir(f"/proc/{monitor_of(client)}/fd")) == before)
    rig.finish(client)


# -- signals, pauses, limits ----------------------------------------------------------------------------------------


def test_signals_reach_one_process_or_all(rig: Rig, runtime: str) -> None:
    trap = "trap 'exit 21' TERM; echo ready; while :; do sleep 0.05; done"
    client, path = rig.run_ready(runtime, trap)
    out = rig.fifo()
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    rig.exec(client, path, "e", ["sh", "-c", trap.replace("21", "22")], stdout=str(out))
    rig.wait_ready(reader)
    rig.exec(client, path, "f", ["sleep", "60"])
    client.call("kill", exec_id="f", signal=15)
    assert client.call("wait", exec_id="f")["exit_status"] == 143
    with pytest.raises(Refused) as refused:
        client.call("kill", exec_id="f", signal=15)
    assert refused.value.code == 5
    with pytest.raises(Refused):
        client.call("kill", signal=99)
    eventually(lambda: len(client.call("state")["execs"]) == 2)
    client.call("kill", signal=15, all=True)
    assert client.call("wait", exec_id="e")["exit_status"] in (22, 137)  # its init may end first and take it along
    assert client.call("wait")["exit_status"] == 21
    rig.finish(client)


def test_a_paused_container_stands_still_and_can_be_killed(rig: Rig, runtime: str) -> None:
    client, path = rig.run(runtime, ["sleep", "60"])
    client.call("pause")
    assert client.call("state")["state"] == "paused"
    with pytest.raises(Refused) as refused:
        rig.exec(client, path, "e", ["true"])
    assert refused.value.code == 9
    with pytest.raises(Refused):
        client.call("pause")
    client.call("resume")
    assert client.call("state")["state"] == "running"
    client.call("pause")
    client.call("kill", signal=9)
    assert client.call("wait")["exit_status"] == 137
    rig.finish(client)
    client, path = rig.run(runtime, ["sleep", "60"])
    client.call("pause")
    assert rig.finish(client)["exit_status"] == 137


def test_too_much_memory_is_told_before_the_exit(rig: Rig, runtime: str) -> None:
    def limit(spec: dict[str, Any]) -> None:
        spec["linux"]["resources"] = {"memory": {"limit": 16 << 20, "swap": 16 << 20}}

    client, _ = rig.run(runtime, ["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"], change=limit)
    first, second = client.notice(), client.notice()
    assert (first["notice"], second["notice"]) == ("oom", "exit")
    assert first["kills"] >= 1 and second["exit_status"] == 137 and second["oom"] is True
    rig.finish(client)


def test_an_exec_that_runs_out_of_memory_is_told_while_the_container_runs(rig: Rig, runtime: str) -> None:
    def limit(spec: dict[str, Any]) -> None:
        spec["linux"]["resources"] = {"memory": {"limit": 16 << 20, "swap": 16 << 20}}

    client, path = rig.run(runtime, ["sleep", "60"], change=limit)
    rig.exec(client, path, "e", ["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"])
    kinds = {client.notice()["notice"], client.notice()["notice"]}
    assert kinds == {"oom", "exit"}
    assert client.call("state")["state"] == "running"
    rig.finish(client)


def test_limits_can_be_changed(rig: Rig, runtime: str) -> None:
    client, _ = rig.run(runtime, ["sleep", "60"])
    client.call("update", resources={"pids": {"limit": 77}})
    groups = client.call("state")["cgroups"]
    folders = [f"/sys/fs/cgroup/pids{groups['pids']}"] if "pids" in groups else [f"/sys/fs/cgroup{groups['']}"]
    assert (Path(folders[0]) / "pids.max").read_text().strip() == "77"
    rig.finish(client)


def test_without_a_pid_namespace_nobody_outlives_the_init(rig: Rig, runtime: str) -> None:
    def shared(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"] = [each for each in spec["linux"]["namespaces"] if each["type"] != "pid"]
        _writable_tmp(spec)

    waiting = "sleep 61 & sleep 62 & until [ -e /tmp/go ]; do sleep 0.05; done; exit 3"
    client, path = rig.run(runtime, ["sh", "-c", waiting], change=shared)
    pid = rig.exec(client, path, "e", ["sleep", "63"])
    Path(f"/proc/{pid}/root/tmp/go").touch()
    assert [(each["id"], each["exit_status"]) for each in (client.notice(), client.notice())] == [("e", 137), ("", 3)]
    groups = client.call("state")["cgroups"]
    folder = f"/sys/fs/cgroup/pids{groups['pids']}" if "pids" in groups else f"/sys/fs/cgroup{groups['']}"
    eventually(lambda: not (Path(folder) / "cgroup.procs").read_text())
    rig.finish(client)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_runtime_that_is_not_there(rig: Rig) -> None:
    container = f"c{uuid.uuid4().hex[:8]}"
    client = rig.spawn(rig.bundle(container, rig.spec(container, ["true"])), "no-such-runtime")
    with pytest.raises(Refused) as refused:
        client.call("create", mounts=rig.mounts())
    assert refused.value.code == 5 and "no-such-runtime" in refused.value.message
    client.call("shutdown")


def test_a_failed_create_tells_why_and_can_be_repeated(rig: Rig, runtime: str) -> None:
    container = f"c{uuid.uuid4().hex[:8]}"
    spec = rig.spec(container, ["true"])
    spec["mounts"].append({"destination": "/tmp", "type": "bind", "source": "/no/such/volume", "options": ["rbind"]})
    path = rig.bundle(container, spec)
    client = rig.spawn(path, runtime)
    with pytest.raises(Refused) as refused:
        client.call("create", mounts=rig.mounts())
    assert "/no/such/volume" in refused.value.message and "create" in refused.value.message
    with pytest.raises(Refused) as refused:
        client.call("create", mounts=[{"type": "bind", "source": "/no/such/rootfs", "options": ["rbind"]}])
    assert refused.value.code == 5 and "/no/such/rootfs" in refused.value.message
    with pytest.raises(Refused) as refused:
        client.call("start")
    assert refused.value.code == 9
    spec["mounts"].pop()
    (path / "config.json").write_text(json.dumps(spec))
    client.call("create", mounts=rig.mounts())
    with pytest.raises(Refused) as refused:
        client.call("create", mounts=rig.mounts())
    assert refused.value.code == 6
    client.call("start")
    assert client.call("wait")["exit_status"] == 0
    rig.finish(client)


def test_a_program_that_is_not_there(rig: Rig, runtime: str) -> None:
    with pytest.raises(Refused) as refused:
        rig.run(runtime, ["/no/such/program"])
    assert "no/such/program" in refused.value.message or "No such file" in refused.value.message


def test_what_is_out_of_place_is_refused(rig: Rig) -> None:
    client, _ = rig.run(RUNTIMES[0], ["sleep", "60"])
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("start", {}, 9), ("resume", {}, 9), ("delete", {}, 9), ("shutdown", {}, 9), ("resize", {}, 9),
        ("nonsense", {}, 12), ("exited", {"pid": 1, "status": 0}, 12), ("spawn", {}, 12), ("oom", {}, 12),
        ("exec", {"exec_id": "../x", "process": "p"}, 3), ("exec", {"exec_id": "x", "process": "../p"}, 3),
        ("exec", {"exec_id": "", "process": "p"}, 6), ("kill", {"signal": "9"}, 3), ("watch", {"after": -1}, 3),
        ("kill", {"exec_id": 7}, 3), ("delete", {"exec_id": "none"}, 5),
    ]  # fmt: skip
    for op, arguments, code in cases:
        with pytest.raises(Refused) as refused:
            client.call(op, **arguments)
        assert refused.value.code == code, (op, arguments)
    assert client.call("state")["state"] == "running"
    rig.finish(client)


@pytest.mark.parametrize(
    "garbage",
    [b"\xff\xff\xff\xff", b"\0\0\0\x02[]", b"\0\0\0\x03{x}", b"\0\0\0\x01\xff", b"\0\1\x86\xa0" + b"[" * 100_000],
)  # fmt: skip
def test_what_is_no_frame_ends_the_connection_alone(rig: Rig, garbage: bytes) -> None:
    client, path = rig.run(RUNTIMES[0], ["sleep", "60"])
    stranger = Client(path)
    stranger.sock.sendall(garbage)
    with pytest.raises((EOFError, ConnectionResetError)):
        stranger.receive()
    assert client.call("state")["state"] == "running"
    rig.finish(client)


def test_bundles_that_are_not_ours_alone_are_refused(rig: Rig) -> None:
    container = f"c{uuid.uuid4().hex[:8]}"
    path = rig.bundle(container, rig.spec(container, ["true"]))
    about = rig.about(path, RUNTIMES[0])
    client = rig.spawn(path, RUNTIMES[0])
    with pytest.raises(Refused) as refused:
        rig.zygote().call("spawn", **about)
    assert refused.value.code == 6
    with pytest.raises(Refused) as refused:
        rig.zygote().call("cleanup", **about)
    assert refused.value.code == 6
    client.call("shutdown")
    os.chmod(path, 0o777)
    with pytest.raises(Refused) as refused:
        rig.zygote().call("spawn", **about)
    assert refused.value.code == 7
    os.chmod(path, 0o700)
    for change, code in (
        ({"bundle": str(path) + "/../x"}, 3), ({"bundle": "relative"}, 3), ({"bundle": "/no/such/bundle"}, 5),
        ({"container": "../up"}, 3), ({"container": "--force"}, 3), ({"runtime": ""}, 3), ({"options": "x"}, 3),
    ):  # fmt: skip
        with pytest.raises(Refused) as refused:
            rig.zygote().call("spawn", **{**about, **change})
        assert refused.value.code == code, change


def test_a_monitor_imports_little(rig: Rig) -> None:
    root = str(Path(str(zygote.__file__)).parents[2])
    code = f"import sys; sys.path.append({root!r}); import wherry_task.monitor.zygote; print(' '.join(sys.modules))"
    done = subprocess.run([PYTHON, "-I", "-S", "-E", "-c", code], stdout=subprocess.PIPE, check=True)
    heavy = {"asyncio", "pydantic", "json", "re", "enum", "typing", "subprocess", "socket", "signal", "collections"}
    assert not heavy & set(done.stdout.decode().split())


# -- helpers --------------------------------------------------------------------------------------------------------


def _writable_tmp(spec: dict[str, Any]) -> None:
    spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})


def _read_some(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 20)
    except BlockingIOError:
        return b""


def _read_end(fd: int) -> bytes:
    """What is left until the end of the stream comes; a stream that stays open fails the test."""
    rest = b""

    def ended() -> bool:
        nonlocal rest
        try:
            data = os.read(fd, 1 << 20)
        except BlockingIOError:
            return False
        rest += data
        return not data

    eventually(ended)
    return rest
