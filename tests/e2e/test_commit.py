"""Containers changed for real, committed, and run again from the image that it makes."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from node import WHERRY, Node, eventually

SCRIPT = """
set -e
echo new > /added
rm /etc/group
echo changed >> /etc/passwd
mkdir -p /srv/deep/er; echo x > /srv/deep/er/file
cp /bin/busybox /srv/setuid; chown 12:34 /srv/setuid; chmod 6755 /srv/setuid
ln /srv/setuid /srv/hard
ln -s /nowhere /srv/link
mkfifo -m 622 /srv/fifo
rm -rf /home; mkdir /home; echo only > /home/only
touch -d '2001-02-03 04:05:06' /srv/old
chmod 1777 /srv/deep
"""
LOOK = "stat -c '%n %f %u:%g %h %Y' /srv/* /added /home/*; readlink /srv/link; ls /home; cat /home/only; ls /etc/group"


@pytest.fixture
def ns(namespace: str) -> list[str]:
    return ["-n", namespace]


@pytest.fixture(params=["overlay", "native", "erofs"])
def changed(
    request: pytest.FixtureRequest, node: Node, ns: list[str], busybox_ref: str
) -> Iterator[tuple[str, list[str]]]:
    """A container that has changed its files and ended, and the snapshotter that it is on."""
    on = ["--snapshotter", request.param]
    node.run("pull", *ns, *on, busybox_ref)
    node.run("run", *ns, *on, "--name", "first", busybox_ref, "sh", "-c", SCRIPT)
    yield "first", on
    node.run("rm", *ns, "-f", "first")


def views(node: Node, ns: list[str], on: list[str]) -> list[str]:
    return [s["name"] for s in node.json("snapshot", "ls", *ns, *on) if s["kind"] == "view"]


def test_diff_lists_what_changed(node: Node, ns: list[str], changed: tuple[str, list[str]]) -> None:
    name, on = changed
    found = {line[2:]: line[0] for line in node.run("diff", *ns, name).stdout.splitlines()}
    expected = {
        "/added": "A", "/etc": "C", "/etc/group": "D", "/etc/passwd": "C", "/srv": "A", "/srv/deep": "A",
        "/srv/deep/er": "A", "/srv/deep/er/file": "A", "/srv/setuid": "A", "/srv/hard": "A", "/srv/link": "A",
        "/srv/fifo": "A", "/srv/old": "A",
    }  # fmt: skip
    assert expected.items() <= found.items()
    assert set(found) - set(expected) <= {"/home", "/home/only", "/dev", "/proc", "/sys", "/etc/resolv.conf"}
    assert {"kind": "D", "path": "/etc/group"} in node.json("diff", *ns, name)
    assert views(node, ns, on) == []


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_commit_and_run_again(node: Node, ns: list[str], changed: tuple[str, list[str]], compression: str) -> None:
    name, on = changed
    done = node.run("commit", *ns, "--compression", compression, "-m", "why", "-a", "me", name, "made:v1")
    digest = done.stdout.split()[-1]
    before = node.run("run", *ns, *on, "--rm", "made:v1", "sh", "-c", LOOK, check=False)
    lines = before.stdout.splitlines()
    assert any(line.startswith("/srv/setuid 8ded 12:34 2 ") for line in lines), before
    assert any(line.startswith("/srv/hard 8ded 12:34 2 ") for line in lines)
    assert any(line.startswith("/srv/deep 43ff 0:0 ") for line in lines)
    assert "/srv/old 81a4 0:0 1 981173106" in lines
    assert "/nowhere" in lines and "only" in lines and "/etc/group" not in lines
    manifest = json.loads(node.run("content", "get", *ns, digest).stdout)
    config = json.loads(node.run("content", "get", *ns, manifest["config"]["digest"]).stdout)
    assert config["history"][-1]["comment"] == "why" and config["author"] == "me"
    assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"]) == 2
    rows = {row["digest"]: row for row in node.json("content", "ls", *ns)}
    kept = {v for k, v in rows[digest]["labels"].items() if k.startswith("containerd.io/gc.ref.content")}
    assert kept == {manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])}
    if compression != "none":
        label = rows[manifest["layers"][-1]["digest"]]["labels"]["containerd.io/uncompressed"]
        assert label == config["rootfs"]["diff_ids"][-1]
    assert node.run("diff", *ns, *on, name, "made:v1").stdout == ""
    assert views(node, ns, on) == []


def test_changes_of_the_config(node: Node, ns: list[str], changed: tuple[str, list[str]]) -> None:
    name, _ = changed
    options = ["-c", 'ENTRYPOINT ["echo"]', "-c", "CMD [\"a b\", \"$GREETING\"]", "-c", "ENV GREETING=hi X='1 2'",
               "-c", "WORKDIR /srv", "-c", "USER 12:34", "-c", "LABEL a=b", "-c", "EXPOSE 80 53/udp"]  # fmt: skip
    node.run("commit", *ns, "--unpack", *options, name, "made:config")
    assert node.run("run", *ns, "--rm", "made:config").stdout == "a b $GREETING\n"
    script = "pwd; id -u; echo $GREETING $X"
    said = node.run("run", *ns, "--rm", "--entrypoint", "sh", "made:config", "-c", script).stdout
    assert said.split("\n") == ["/srv", "12", "hi 1 2", ""]
    when = {"env": {**node.environment, "SOURCE_DATE_EPOCH": "1000000000"}}
    again = [node.run("commit", *ns, "-q", name, f"made:{n}", **when).stdout for n in ("one", "two")]
    assert again[0] == again[1]
    refused = node.run("commit", *ns, "-c", "RUN rm -rf /", name, "made:no", check=False)
    assert refused.returncode == 1 and "RUN" in refused.stderr


def test_commit_of_a_running_one_goes_on_afterwards(node: Node, ns: list[str], busybox_ref: str) -> None:
    node.run("pull", *ns, busybox_ref)
    loop = "i=0; while :; do i=$((i+1)); echo $i > /counter.new; mv /counter.new /counter; done"
    node.run("run", *ns, "-d", "--name", "loop", busybox_ref, "sh", "-c", loop)
    for pause in ("--pause", "--no-pause"):
        node.run("commit", *ns, pause, "loop", f"made:{pause.strip('-')}")
        said = node.run("run", *ns, "--rm", f"made:{pause.strip('-')}", "cat", "/counter").stdout
        assert int(said) > 0
    (row,) = node.json("ps", *ns)
    assert row["status"] == "running"
    node.run("rm", *ns, "-f", "loop")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_commit_that_is_told_to_end_leaves_nothing_paused(
    node: Node, ns: list[str], busybox_ref: str, number: signal.Signals
) -> None:
    node.run("pull", *ns, busybox_ref)
    node.run("run", *ns, "-d", "--name", "goes-on", busybox_ref, "sleep", "600")
    node.run("exec", *ns, "goes-on", "dd", "if=/dev/urandom", "of=/big", "bs=1M", "count=300")

    def status() -> str:
        (row,) = node.json("ps", *ns)
        return str(row["status"])

    with node.standing_still("diff"):  # whatever it has compared by then, it does not answer
        process = subprocess.Popen([WHERRY, "commit", *ns, "goes-on", "made:1"], env=node.environment, process_group=0)
        eventually(lambda: status() == "paused", "it is not paused")
        eventually(lambda: _begun(node, ns), "it is not compared")
        process.send_signal(number)
    assert process.wait(60) == (130 if number == signal.SIGINT else -number)
    assert status() == "running"
    assert not views(node, ns, []) and not node.json("lease", "ls", *ns)
    # The comparison itself ends when it finds that its lease is gone.
    eventually(lambda: not node.json("content", "ingests", *ns), "its ingest stays", 60)
    node.run("rm", *ns, "-f", "goes-on")


def _begun(node: Node, ns: list[str]) -> bool:
    """Whether the comparison writes; the service has a moment for that, and stands still again."""
    node.kill("diff", signal.SIGCONT)
    time.sleep(0.05)
    node.kill("diff", signal.SIGSTOP)
    return bool(node.json("content", "ingests", *ns))


def test_commit_of_a_commit(node: Node, ns: list[str], busybox_ref: str) -> None:
    node.run("pull", *ns, busybox_ref)
    image = busybox_ref
    for step in range(3):
        node.run("run", *ns, "--name", f"c{step}", image, "sh", "-c", f"echo {step} > /f{step}; rm -f /f{step - 1}")
        node.run("commit", *ns, f"c{step}", f"made:{step}")
        image = f"made:{step}"
    assert node.run("run", *ns, "--rm", image, "sh", "-c", "ls -d /f*").stdout == "/f2\n"
    assert node.run("diff", *ns, "made:0", "made:2").stdout.splitlines() == ["D /f0", "A /f2"]
    for step in range(3):
        node.run("rm", *ns, f"c{step}")


def test_a_layer_of_elsewhere_keeps_its_urls(node: Node, ns: list[str], busybox_ref: str, tmp_path: Path) -> None:
    node.run("pull", *ns, busybox_ref)
    node.run("export", *ns, "--no-docker", str(tmp_path / "plain.tar"), busybox_ref)
    with tarfile.open(tmp_path / "plain.tar") as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive.getmembers() if m.isfile()}  # type: ignore[union-attr]
    index = json.loads(files["index.json"])
    while "layers" not in (document := json.loads(files[blob_of(index["manifests"][0])])):
        index = document
    kind = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
    document["layers"][0] |= {"mediaType": kind, "urls": ["https://elsewhere.example/layer"]}
    raw = json.dumps(document).encode()
    target = {
        "mediaType": document["mediaType"], "digest": f"sha256:{hashlib.sha256(raw).hexdigest()}", "size": len(raw),
        "annotations": {"io.containerd.image.name": "docker.io/library/foreign:1"},
    }  # fmt: skip
    files[blob_of(target)] = raw
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [target]}).encode()
    with tarfile.open(tmp_path / "foreign.tar", "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    node.run("import", *ns, str(tmp_path / "foreign.tar"))
    node.run("images", "rm", *ns, busybox_ref)
    node.run("run", *ns, "--name", "own", "foreign:1", "touch", "/here")
    digest = node.run("commit", *ns, "-q", "own", "made:1").stdout.strip()
    made = json.loads(node.run("content", "get", *ns, digest).stdout)
    assert made["layers"][0]["urls"] == ["https://elsewhere.example/layer"]
    node.run("rm", *ns, "own")


def blob_of(descriptor: dict[str, Any]) -> str:
    return f"blobs/{descriptor['digest'].replace(':', '/')}"


def test_what_cannot_be_committed_is_named(node: Node, ns: list[str], busybox_ref: str) -> None:
    done = node.run("commit", *ns, "nobody", "made:x", check=False)
    assert done.returncode == 1 and "nobody" in done.stderr
    node.run("pull", *ns, busybox_ref)
    node.run("run", *ns, "--name", "odd", busybox_ref, "touch", "/.wh.passwd")
    done = node.run("commit", *ns, "odd", "made:x", check=False)
    assert done.returncode == 1 and ".wh.passwd" in done.stderr and "Traceback" not in done.stderr
    assert node.json("content", "ingests", *ns) == [] and views(node, ns, []) == []
    node.run("rm", *ns, "odd")


def test_a_tenant_commits_its_own(node: Node, namespace: str, ns: list[str], busybox_ref: str) -> None:
    creds = node.run("auth", "tenant", namespace, "--state", str(node.state)).stdout.strip()
    mine = {"env": {**node.environment, "WHERRY_CREDS": creds}}
    eventually(lambda: node.run("ps", *ns, check=False, **mine).returncode == 0, "the tenant is not let in")
    node.run("run", *ns, "--name", "own", busybox_ref, "touch", "/here", **mine)
    assert node.run("diff", *ns, "own", **mine).stdout.splitlines()[-1] == "A /here"
    node.run("commit", *ns, "own", "made:own", **mine)
    assert node.run("run", *ns, "--rm", "made:own", "ls", "/here", **mine).stdout == "/here\n"
    node.run("rm", *ns, "own", **mine)
