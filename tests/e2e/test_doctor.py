"""`wherry doctor` on a node that is whole, and on one where something real is broken."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import wherry
import wherry.doctor
from node import Node, eventually
from wherry.doctor.afar import restart_policies
from wherry.doctor.findings import Check, Patient
from wherry_shared.errors import DeadlineExceeded

Report = dict[str, Any]
ON_THE_NODE = {
    "programs", "kernel", "room", "time", "databases", "outboxes", "leases", "permissions", "direct path", "put aside",
    "blobs", "monitors", "left over", "mounts",
}  # fmt: skip
FROM_AFAR = {"services", "clock", "plugins", "images", "containers", "restarts", "events"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node of its own: what others leave on theirs is not for this one to find."""
    with Node(tmp_path_factory.mktemp("patient")) as made:
        yield made


def examine(node: Node, **environment: str) -> Report:
    done = node.run("doctor", "--format", "json", check=False, env={**node.environment, **environment})
    assert done.returncode in (0, 1), done.stderr
    report: Report = json.loads(done.stdout)
    broken = [f for f in report["findings"] if f["severity"] == "broken"]
    assert report["healthy"] == (not broken) == (done.returncode == 0)
    for finding in report["findings"]:
        assert all(finding[field] for field in ("part", "what", "why", "todo")), finding
    return report


def broken(report: Report) -> list[str]:
    return [finding["what"] for finding in report["findings"] if finding["severity"] == "broken"]


def warned(report: Report) -> list[str]:
    return [finding["what"] for finding in report["findings"] if finding["severity"] == "warning"]


def put_away(node: Node, namespace: str, *containers: str) -> None:
    for container in containers:
        node.run("rm", "-f", "-n", namespace, container)


@pytest.fixture
def container(node: Node, namespace: str, busybox_ref: str) -> Iterator[str]:
    """A container that runs, and goes at the end."""
    node.run("run", "-d", "-n", namespace, "--name", "c1", busybox_ref, "sleep", "600")
    yield "c1"
    node.run("rm", "-f", "-n", namespace, "c1", check=False)


@contextlib.contextmanager
def rows(node: Node, service: str) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(node.root / service / "metadata.db", isolation_level=None, timeout=10)) as connection:
        yield connection


# ---- whole


def test_a_healthy_node(node: Node, container: str) -> None:
    report = examine(node)
    assert report["healthy"], broken(report)
    assert report["left_out"] == []
    assert set(report["looked_at"]) == FROM_AFAR | ON_THE_NODE
    assert warned(report) == []
    printed = node.run("doctor").stdout
    assert printed.splitlines()[-1].startswith("nothing is broken; looked at services, clock")


def test_info_tells_what_services_and_runtimes_are(node: Node) -> None:
    told = node.json("info", "--runtimes")
    for service in told["services"]:
        assert service["package"] and service["uptime"] > 0 and 0 < service["pss"] <= service["rss"]
    runtimes = {runtime["name"]: runtime for runtime in told["runtimes"]}
    assert set(runtimes) == {p["id"] for p in told["plugins"] if p["type"] == "io.containerd.runtime.v2"}
    assert all(runtime["version"] and runtime["path"].startswith("/") for runtime in runtimes.values())
    if shutil.which("runc"):
        assert runtimes["runc"]["features"]["ociVersionMin"]
    assert all(plugin["platforms"] for plugin in told["plugins"])
    assert "UPTIME" in node.run("info").stdout


def test_a_tenant_may_not_look(node: Node, namespace: str) -> None:
    node.run("auth", "tenant", namespace, "--state", str(node.state))
    done = node.run(
        "doctor", check=False, env={**node.environment, "WHERRY_CREDS": f"{node.state}/creds/tenant-{namespace}.nk"}
    )
    assert (done.returncode, done.stdout) == (1, "")


def test_from_afar(node: Node, tmp_path: Path) -> None:
    """The bus and a seed are all there is: what lies on the node is left out, and said to be."""
    known = json.loads((node.state / "node.json").read_text())
    seed = tmp_path / "admin.nk"
    shutil.copy(node.state / "creds" / "admin.nk", seed)
    program = (
        "import asyncio, json, sys; from dataclasses import asdict; from pathlib import Path\n"
        "import wherry.doctor as d; d.boot_id = lambda: 'another machine'\n"
        "r = asyncio.run(d.examine(state='/nonexistent', nats=sys.argv[1], node=sys.argv[2], creds=sys.argv[3]))\n"
        "print(json.dumps(asdict(r)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, known["nats"], known["node"], str(seed)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert set(report["looked_at"]) == FROM_AFAR
    assert {left["part"] for left in report["left_out"]} == ON_THE_NODE
    assert broken(report) == []


def test_the_files_are_found_without_the_state_directory(node: Node) -> None:
    """As under systemd: the environment says where the bus is, and the node's own id proves whose files these are."""
    known = json.loads((node.state / "node.json").read_text())
    report = examine(
        node, WHERRY_STATE="/nonexistent", WHERRY_NATS=known["nats"], WHERRY_NODE=known["node"],
        WHERRY_CREDS=str(node.state / "creds" / "admin.nk"),
    )  # fmt: skip
    assert report["left_out"] == []
    assert report["healthy"]


# ---- services and the bus


def test_a_service_that_hangs(node: Node) -> None:
    with node.standing_still("image"):
        report = examine(node)
    assert broken(report) == ["image does not answer"]
    assert {"part": "images", "why": "image does not answer"} in report["left_out"]
    assert {"services", "containers", "databases"} <= set(report["looked_at"])


async def test_a_service_that_is_there_and_does_not_do_its_work(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def look(patient: Patient) -> list[wherry.doctor.Finding]:
        raise DeadlineExceeded("image.walk: no answer within the deadline")

    monkeypatch.setattr("wherry.doctor.CHECKS", (Check("images", look, ("image",)),))
    report = await wherry.doctor.examine(state=str(node.state))
    (finding,) = report.findings
    assert not report.healthy and finding.what == "images cannot be looked at" and "image" in finding.todo
    assert [left.part for left in report.left_out] == ["images"]


async def test_a_clock_that_is_far_behind_the_nodes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request from here is late there, which is said at once, and not waited for."""
    here, began = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: here() - 1000)
    monkeypatch.setattr("wherry.doctor.afar.now", lambda: datetime.fromtimestamp(time.time(), UTC))
    report = await wherry.doctor.examine(state=str(node.state))
    told = {finding.part: finding for finding in report.findings if finding.severity == "broken"}
    assert told["clock"].what == "the node's clock is 1000 s off this one's"
    assert "do the clocks agree?" in told["images"].why
    assert time.monotonic() - began < 20


def test_a_node_that_was_never_there(node: Node, tmp_path: Path) -> None:
    report = examine(node, WHERRY_STATE=str(tmp_path), WHERRY_ROOT=str(tmp_path))
    assert broken(report) == ["the bus cannot be reached"]
    assert report["looked_at"] == []
    assert "wherry up" in report["findings"][0]["why"]


def test_a_seed_that_others_can_read(node: Node, tmp_path: Path) -> None:
    seed = tmp_path / "admin.nk"
    shutil.copy(node.state / "creds" / "admin.nk", seed)
    seed.chmod(0o644)
    report = examine(node, WHERRY_CREDS=str(seed))
    assert broken(report) == ["the bus cannot be reached"]
    assert "can be read by others" in report["findings"][0]["why"]


# ---- what is stored


def test_an_image_that_lacks_a_layer(node: Node, namespace: str, busybox_ref: str) -> None:
    node.run("pull", "-n", namespace, busybox_ref)
    blobs = node.json("content", "ls", "-n", namespace)
    layer = max(blobs, key=lambda blob: blob["size"])["digest"]
    node.run("content", "rm", "-n", namespace, layer)
    report = examine(node)
    assert broken(report) == [f"image {busybox_ref} of namespace {namespace} is incomplete"]
    found = next(f for f in report["findings"] if f["part"] == "images")
    assert f"layer {layer}" in found["why"]
    assert found["todo"].startswith(f"wherry pull -n {namespace} {busybox_ref}")
    node.run(*found["todo"].partition(",")[0].split()[1:])
    assert examine(node)["healthy"]


def test_a_blob_whose_file_is_gone(node: Node, namespace: str, busybox_ref: str) -> None:
    node.run("pull", "-n", namespace, busybox_ref)
    layer = max(node.json("content", "ls", "-n", namespace), key=lambda blob: blob["size"])["digest"]
    path = node.root / "content" / "blobs" / "sha256" / layer.partition(":")[2]
    path.rename(path.with_suffix(".away"))
    path.touch()
    try:
        report = examine(node)
    finally:
        path.with_suffix(".away").rename(path)
    assert broken(report) == [f"the file of blob {layer} is gone or short"]
    assert any(f"{path}: it has 0 of" in f["why"] for f in report["findings"])
    node.run("images", "rm", "-n", namespace, busybox_ref)


def test_a_database_that_is_damaged(node: Node, tmp_path: Path) -> None:
    """A copy of the node's directory, as it would be found when the node is down."""
    root, state = tmp_path / "root", tmp_path / "state"
    shutil.copytree(node.root, root, ignore=shutil.ignore_patterns("nats", "snapshots", "*-shm"), symlinks=True)
    state.mkdir(mode=0o700)
    (state / "node.json").write_text(json.dumps({"nats": "nats://127.0.0.1:1", "node": "n", "root": str(root)}))
    damaged, gone = root / "image" / "metadata.db", root / "lease" / "metadata.db"
    for suffix in ("", "-wal"):
        gone.with_name(gone.name + suffix).unlink(missing_ok=True)
    damaged.with_name("metadata.db-wal").unlink(missing_ok=True)
    with damaged.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(12 << 10))
    (root / "container" / "metadata.db-wal").write_bytes(os.urandom(8192))
    before = sorted(path.name for path in damaged.parent.iterdir())
    report = examine(node, WHERRY_STATE=str(state))
    assert set(broken(report)) == {
        "the bus cannot be reached", "the database of image is damaged", "the database of container is damaged",
        "the database of lease is gone",
    }  # fmt: skip
    assert sorted(path.name for path in damaged.parent.iterdir()) == before, "it leaves nothing behind"
    assert all("restore=backup" in f["todo"] for f in report["findings"] if f["part"] == "databases")
    assert {left["part"] for left in report["left_out"]} == FROM_AFAR | {
        "blobs", "direct path", "monitors", "left over", "mounts"
    }  # fmt: skip
    assert {"programs", "kernel", "permissions"} <= set(report["looked_at"])


def test_events_that_wait_and_leases_that_stay(node: Node) -> None:
    """Both services stand still, as they would if they hung; what is due stays undone."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(node.standing_still("lease"))
        stack.enter_context(node.standing_still("image"))
        with rows(node, "image") as image, rows(node, "lease") as lease:
            event = ("e" * 24, "default", "/images/create", "2020-01-01T00:00:00+00:00", '{"name": "x"}')
            image.execute("INSERT INTO outbox (id, namespace, topic, at, event) VALUES (?, ?, ?, ?, ?)", event)
            lease.execute("INSERT INTO expiries VALUES ('default', 'old', 1000)")
            found = broken(examine(node))
            image.execute("DELETE FROM outbox")
            lease.execute("DELETE FROM expiries WHERE lease = 'old'")
    assert {"1 events of image wait to be told", "1 leases have expired and are still there"} <= set(found)


# ---- who may read


def test_what_is_open_to_others(node: Node) -> None:
    seed, folder, database = (
        node.state / "creds" / "content.nk",
        node.root / "image",
        node.root / "task" / "metadata.db",
    )
    modes = {path: path.stat().st_mode & 0o7777 for path in (seed, folder, database, node.state)}
    try:
        seed.chmod(0o640)
        folder.chmod(0o770)
        database.chmod(0o644)
        assert set(broken(examine(node))) == {
            f"{seed} can be read by others", f"{folder} can be written by others", f"{database} can be read by others",
        }  # fmt: skip
        node.state.chmod(0o755)
        assert f"{node.state} can be read by others" in broken(examine(node))
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def test_a_socket_that_is_gone(node: Node) -> None:
    (socket,) = (node.state / "image" / "direct").glob("*.image/*.sock")
    away = socket.with_suffix(".away")
    socket.rename(away)
    try:
        report = examine(node)
    finally:
        away.rename(socket)
    assert warned(report) == ["image is reached by NATS alone"]
    assert report["healthy"]


# ---- tasks


def test_a_monitor_that_hangs(node: Node, namespace: str, container: str) -> None:
    bundle = node.state / "task" / "tasks" / namespace / container
    monitor = json.loads((bundle / "monitor.json").read_text())["monitor"]["pid"]
    os.kill(monitor, signal.SIGSTOP)
    try:
        found = broken(examine(node))
    finally:
        os.kill(monitor, signal.SIGCONT)
    assert found == [f"the monitor of {container} in {namespace} is gone or hangs"]


def test_a_container_whose_records_are_gone(node: Node, namespace: str, container: str) -> None:
    """Its record deleted under it, the task is an orphan; its snapshot removed, a container is broken."""
    program = (
        "import asyncio, sys, wherry\n"
        "async def main():\n"
        "    async with wherry.connect(namespace=sys.argv[1]) as client:\n"
        "        known = await client.containers.get('c1')\n"
        "        other = known.model_copy(update={'id': 'c2', 'snapshot_key': 'nowhere'})\n"
        "        await client.containers.create(other)\n"
        "        await client.containers.delete('c1')\n"
        "        print('done', flush=True)\n"
        "        sys.stdin.readline()\n"
        "        await client.tasks.delete('c1', force=True)\n"
        "        await client.containers.delete('c2')\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, namespace], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=node.environment,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        assert process.stdout.readline()
        found = broken(examine(node))
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(60) == 0
    # The collector may have taken the orphan's snapshot by then, which is found as well.
    assert {
        f"container c2 of namespace {namespace} has no snapshot", f"task c1 of namespace {namespace} has no container",
    } <= set(found)  # fmt: skip


def test_what_is_left_over(node: Node) -> None:
    own = hashlib.sha256(str(node.state / "task").encode()).hexdigest()[:12]
    base = next(path for path in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")) if path.is_dir())
    cgroup = base / f"wherry-{own}" / "nobody" / "gone"
    bundle = node.state / "task" / "tasks" / "nobody" / "gone"
    sleeping = subprocess.Popen(["sleep", "600"])
    try:
        cgroup.mkdir(parents=True)
        bundle.mkdir(parents=True)
        (cgroup / "cgroup.procs").write_text(str(sleeping.pid))
        report = examine(node)
        assert set(broken(report)) == {
            "a cgroup with 1 processes of no task: nobody gone",
            "a bundle of no task: nobody gone",
        }
        assert {f["why"] for f in report["findings"] if f["part"] == "left over"} == {str(cgroup), str(bundle)}
    finally:
        sleeping.kill()
        sleeping.wait()
        shutil.rmtree(bundle.parent)
        eventually(lambda: removed(cgroup), f"{cgroup} stays")
        cgroup.parent.rmdir()


def removed(cgroup: Path) -> bool:
    with contextlib.suppress(OSError):
        cgroup.rmdir()
    return not cgroup.exists()


def test_a_monitor_of_no_task(node: Node, namespace: str, container: str) -> None:
    """A process that calls itself a monitor and works where one would, of a container that nobody knows."""
    bundle = node.state / "task" / "tasks" / namespace / "ghost"
    bundle.mkdir()
    program = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'wherry-monitor', 0, 0, 0)"
    program += "; print(1, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program], cwd=bundle, stdout=subprocess.PIPE) as ghost:
        try:
            assert ghost.stdout and ghost.stdout.readline()
            report = examine(node)
        finally:
            ghost.kill()
            bundle.rmdir()
    assert f"a monitor of no task: {namespace} ghost" in broken(report)
    assert any(f["todo"] == f"kill {ghost.pid}" for f in report["findings"])


def test_a_mount_of_no_snapshot(node: Node, namespace: str, container: str, tmp_path: Path) -> None:
    """The container's own mount is a snapshot's; one beside it in another mount namespace is not."""
    snapshot = node.root / "snapshot" / "overlay" / "snapshots" / "999999"
    for name in ("fs", "work", "lower"):
        (snapshot / name).mkdir(parents=True)
    target = tmp_path / "mounted"
    target.mkdir()
    options = f"lowerdir={snapshot}/lower,upperdir={snapshot}/fs,workdir={snapshot}/work"
    script = f"mount -t overlay overlay -o {options} {target} && echo mounted && exec sleep 600"
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout and holder.stdout.readline() == b"mounted\n"
            report = examine(node)
        finally:
            holder.kill()
            holder.wait()
            time.sleep(0.05)
            shutil.rmtree(snapshot)
    assert broken(report) == ["directory 999999 of snapshotter overlay is mounted, and is no snapshot's"]
    found = next(f for f in report["findings"] if f["part"] == "mounts")
    assert found["why"] == f"{target} in the mount namespace of process {holder.pid}"


async def test_a_container_that_nobody_starts_again(
    node: Node, namespace: str, busybox_ref: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wherry.doctor.afar.LATE_SECONDS", 0.0)
    for name, policy in (("kept", "always"), ("failed", "on-failure"), ("ended", "on-failure"), ("stopped", "always")):
        end = "exit 3" if name == "failed" else "sleep 1000"
        node.run("create", "-n", namespace, "--restart", policy, "--name", name, busybox_ref, "sh", "-c", end)
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        with node.standing_still("keeper"):
            node.run("start", "-n", namespace, "failed")
            assert node.run("wait", "-n", namespace, "failed").stdout.strip() == "3"
            node.run("start", "-n", namespace, "stopped", "kept")
            node.run("kill", "-n", namespace, "stopped")
            assert await _restarts(client) == ["failed"]
        with node.standing_still("keeper", signal.SIGKILL):
            pass
        node.run("rm", "-f", "-n", namespace, "failed")
        assert await _restarts(client) == []
    put_away(node, namespace, "kept", "ended", "stopped")


async def _restarts(client: wherry.Client) -> list[str]:
    found = await restart_policies(Patient(client, None))
    return [finding.what.split()[1] for finding in found]


def test_it_is_healthy_again(node: Node) -> None:
    """All that was done to it above is undone, and nothing of it is found any more."""
    report = examine(node)
    assert report["healthy"], broken(report)
