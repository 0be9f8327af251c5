"""`wherry cp`, into and out of containers that run and that do not."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from node import WHERRY, Node


@pytest.fixture
def ns(namespace: str) -> list[str]:
    return ["-n", namespace]


@pytest.fixture(params=["running", "stopped", "never started"])
def container(request: pytest.FixtureRequest, node: Node, ns: list[str], busybox_ref: str) -> Iterator[str]:
    if request.param == "never started":
        node.run("create", *ns, "--name", "c", busybox_ref, "sleep", "1000")
    else:
        node.run("run", *ns, "-d", "--name", "c", busybox_ref, "sleep", "1000")
    if request.param == "stopped":
        node.run("stop", *ns, "-t", "0", "c")
    yield "c"
    node.run("rm", *ns, "-f", "c")


def test_both_ways(node: Node, ns: list[str], container: str, tmp_path: Path) -> None:
    (tmp_path / "dir/sub").mkdir(parents=True)
    (tmp_path / "dir/file").write_text("hello\n")
    (tmp_path / "dir/sub/other").write_text("again\n")
    node.run("cp", *ns, str(tmp_path / "dir"), "c:/tmp")
    node.run("cp", *ns, str(tmp_path / "dir/file"), "c:/tmp/renamed")
    node.run("cp", *ns, "c:/tmp", str(tmp_path / "back"))
    assert (tmp_path / "back/dir/sub/other").read_text() == "again\n"
    assert (tmp_path / "back/renamed").read_text() == "hello\n"
    node.run("cp", *ns, "c:/tmp/dir/.", str(tmp_path / "dir/sub"))
    assert (tmp_path / "dir/sub/file").read_text() == "hello\n"
    out = subprocess.run(
        [WHERRY, "cp", *ns, "c:/tmp/dir", "-"], env=node.environment, capture_output=True, check=True
    ).stdout  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(out)) as tar:
        assert sorted(tar.getnames()) == ["dir", "dir/file", "dir/sub", "dir/sub/other"]
    node.run("cp", *ns, "-", "c:/root", text=False, input=out)
    node.run("start", *ns, "c")
    assert node.run("exec", *ns, "c", "cat", "/root/dir/file", "/tmp/renamed").stdout == "hello\nhello\n"
    assert node.run("exec", *ns, "c", "stat", "-c", "%u", "/tmp/renamed").stdout == "0\n"


def test_links_of_the_container_lead_nowhere_else(node: Node, ns: list[str], busybox_ref: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("untouched")
    script = f"ln -s {tmp_path} /way; ln -s / /root/all; ln -s {canary}/file /file; sleep 1000"
    node.run("run", *ns, "-d", "--name", "evil", busybox_ref, "sh", "-c", script)
    node.run("exec", *ns, "evil", "sh", "-c", "while [ ! -L /file ]; do sleep 0.02; done")
    payload = tmp_path / "payload"
    payload.write_text("evil")
    assert node.run("cp", *ns, str(payload), "evil:/way/canary/file", check=False).returncode == 1
    node.run("cp", *ns, str(payload), "evil:/file")
    assert node.run("cp", *ns, "-L", f"evil:/way/{canary.name}/file", str(tmp_path / "x"), check=False).returncode == 1
    assert (canary / "file").read_text() == "untouched" and not (tmp_path / "x").exists()
    assert node.run("exec", *ns, "evil", "cat", "/file").stdout == "evil"
    node.run("rm", *ns, "-f", "evil")


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("c:/nowhere", "OUT", "No such file"),
        ("c:/etc", "c:/tmp", "one of the two"),
        ("OUT", "c:/no/where/at/all", "no such directory"),
        ("OUT", "c:/etc/passwd/x", "no such directory"),
    ],
)
def test_what_cannot_be_copied_is_said(
    node: Node, ns: list[str], busybox_ref: str, tmp_path: Path, source: str, target: str, reason: str
) -> None:
    node.run("create", *ns, "--name", "c", busybox_ref, "true")
    (tmp_path / "out").write_text("x")
    names = [name.replace("OUT", str(tmp_path / "out")) for name in (source, target)]
    done = node.run("cp", *ns, *names, check=False)
    assert done.returncode == 1 and reason in done.stderr
    node.run("rm", *ns, "c")


def test_a_name_in_a_container_does_not_steer_the_terminal(
    node: Node, ns: list[str], busybox_ref: str, tmp_path: Path
) -> None:
    """Neither by what is left out nor by an error."""
    name = "\x1b]0;gone\x07"
    node.run("run", *ns, "-d", "--name", "c", busybox_ref, "sleep", "1000")
    node.run("exec", *ns, "c", "sh", "-c", 'mkdir /evil && mknod "/evil/$1" c 1 3 && echo > "/$1"', "-", name)
    said = node.run("cp", *ns, "c:/evil", str(tmp_path / "out")).stderr
    assert "gone? is left out" in said and "\x1b" not in said
    (tmp_path / "d").mkdir()
    failed = node.run("cp", *ns, str(tmp_path / "d"), f"c:/{name}", check=False)
    assert failed.returncode and "gone?" in failed.stderr and "\x1b" not in failed.stderr
    node.run("rm", *ns, "-f", "c")
