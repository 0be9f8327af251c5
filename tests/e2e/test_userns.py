"""Containers whose root is nobody on the node: their files, their commands, and what becomes an image."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from node import Node, eventually

FIRST, GROUP = 100_000, 200_000
REMAP = ["--userns-remap", f"{FIRST}:{GROUP}:65536"]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """On a path that anybody may pass, as /run is: pytest's own directories are closed."""
    base = Path(tempfile.mkdtemp(prefix="wherry-userns-"))
    base.chmod(0o711)
    try:
        with Node(base) as made:
            yield made
    finally:
        shutil.rmtree(base)


@pytest.fixture
def ns(namespace: str) -> list[str]:
    return ["-n", namespace]


@pytest.fixture
def pulled(node: Node, ns: list[str], busybox_ref: str) -> str:
    node.run("pull", *ns, busybox_ref)
    return busybox_ref


def upper(node: Node, ns: list[str], key: str) -> Path:
    (mount,) = node.json("snapshot", "mounts", *ns, key)
    return Path(next(o for o in mount["options"] if o.startswith("upperdir=")).partition("=")[2])


def owners(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


def open_to_others(state: Path) -> list[Path]:
    """What has a mode for others than its owner; rootfs directories lie in closed bundles, and links have none."""
    found = [path for path in state.rglob("*") if path.name != "rootfs" and not path.is_symlink()]
    return [path for path in found if path.lstat().st_mode & 0o077]


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_root_is_nobody_on_the_node_and_owns_its_files(node: Node, ns: list[str], pulled: str, runtime: str) -> None:
    script = "echo x >> /etc/passwd; echo new > /new; mkdir /dir;chown 5:6 /dir; rm /bin/true; exec sleep 1000"
    node.run("run", *ns, "-d", "--runtime", runtime, *REMAP, "--name", "mapped", pulled, "sh", "-c", script)
    try:
        inside = node.run("exec", *ns, "mapped", "sh", "-c", "id -u; cat /new; grep -c x /etc/passwd; ls -ldn /dir")
        said = inside.stdout.split()
        assert said[:3] == ["0", "new", said[2]] and int(said[2]) > 0 and said[5:7] == ["5", "6"]
        pid = next(c["pid"] for c in node.json("ps", *ns) if c["id"] == "mapped")
        status = Path(f"/proc/{pid}/status").read_text()
        assert f"Uid:\t{FIRST}\t" in status and f"Gid:\t{GROUP}\t" in status
        layer = upper(node, ns, "mapped")
        assert owners(layer / "new") == owners(layer / "etc/passwd") == owners(layer) == (FIRST, GROUP)
        assert owners(layer / "dir") == (FIRST + 5, GROUP + 6)
        # On the way to its root others may pass, but not look around; everything else is closed.
        opened = {path: stat.S_IMODE(path.lstat().st_mode) for path in open_to_others(node.state)}
        assert opened.pop(node.state / "task/tasks" / ns[1] / "mapped") == 0o710
        tasks = node.state / "task/tasks"
        assert all(mode == 0o711 and path in (tasks, *tasks.parents, *tasks.iterdir()) for path, mode in opened.items())
        # What becomes an image has the container's numbers again.
        node.run("commit", *ns, "mapped", f"made:{runtime}")
        look = "stat -c %u:%g /new /etc/passwd /dir; ls /bin/true"
        seen = node.run("run", *ns, "--rm", f"made:{runtime}", "sh", "-c", look, check=False)
        assert seen.stdout.split() == ["0:0", "0:0", "5:6"] and "No such file" in seen.stderr
    finally:
        node.run("rm", *ns, "-f", "mapped")


def test_limits_hold_for_it_too(node: Node, ns: list[str], pulled: str) -> None:
    """CVE-2025-47291: whoever is root in a namespace of users is not let out of the limits."""
    limits = ["--memory", "32m", "--memory-swap", "32m", "--pids-limit", "20"]
    hog = "a=x; while true; do a=$a$a; done"
    done = node.run("run", *ns, "--rm", *REMAP, *limits, pulled, "sh", "-c", hog, check=False)
    assert done.returncode == 137
    many = "for i in $(seq 40); do sleep 5 & done; wait"
    done = node.run("run", *ns, "--rm", *REMAP, *limits, pulled, "sh", "-c", many, check=False)
    assert "fork" in done.stderr, done.stderr


def test_files_are_copied_with_the_containers_numbers(node: Node, ns: list[str], pulled: str, tmp_path: Path) -> None:
    script = "mkdir /own; echo mine > /own/file; chown -R 5:6 /own; exec sleep 1000"
    node.run("run", *ns, "-d", *REMAP, "--name", "copied", pulled, "sh", "-c", script)
    (tmp_path / "given/deep").mkdir(parents=True)
    (tmp_path / "given/deep/file").write_text("given\n")
    os.chown(tmp_path / "given/deep/file", 7, 8)
    eventually(
        lambda: node.run("exec", *ns, "copied", "test", "-f", "/own/file", check=False).returncode == 0, "no file"
    )
    node.run("cp", *ns, str(tmp_path / "given"), "copied:/var/log/given")  # into a directory that is its image's
    node.run("cp", *ns, "-a", str(tmp_path / "given"), "copied:/kept")
    look = "stat -c %u:%g /var/log /var/log/given /var/log/given/deep/file /kept/deep/file; cat /kept/deep/file"
    seen = node.run("exec", *ns, "copied", "sh", "-c", look).stdout.split()
    assert seen == ["0:0", "0:0", "0:0", "7:8", "given"]
    node.run("cp", *ns, "-", "copied:/", input=_tar("loose/deep/file", b"in").getvalue(), text=False)
    assert node.run("exec", *ns, "copied", "stat", "-c", "%u:%g", "/loose", "/loose/deep").stdout.split() == ["0:0"] * 2

    def copied_out(name: str) -> None:
        node.run("cp", *ns, "-a", "copied:/own", str(tmp_path / name))
        assert owners(tmp_path / name / "file") == (5, 6) and (tmp_path / name / "file").read_text() == "mine\n"
        node.run("cp", *ns, "-a", "copied:/etc/passwd", str(tmp_path / f"{name}-passwd"))
        assert owners(tmp_path / f"{name}-passwd") == (0, 0)

    copied_out("running")
    node.run("stop", *ns, "-t", "0", "copied")
    copied_out("stopped")
    refused = node.run("cp", *ns, str(tmp_path / "given"), "copied:/no", check=False)
    assert refused.returncode == 1 and "while it does not run" in refused.stderr
    node.run("rm", *ns, "copied")


def _tar(name: str, data: bytes) -> io.BytesIO:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    made.seek(0)
    return made


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_its_null_device_is_not_the_nodes(node: Node, ns: list[str], pulled: str, runtime: str) -> None:
    """Bound from the node, as a user namespace may make none; crun gives its owner away with the standard streams."""
    node.run("run", "-d", *ns, *REMAP, "--runtime", runtime, "--name", "null", pulled, "sleep", "1000")
    (found,) = node.json("inspect", *ns, "null")
    ours, its = os.stat("/dev/null"), os.stat(f"/proc/{found['task']['pid']}/root/dev/null")
    assert its.st_rdev == ours.st_rdev
    assert (its.st_dev, its.st_ino) != (ours.st_dev, ours.st_ino)
    node.run("exec", *ns, "null", "sh", "-c", "echo x > /dev/null")
    node.run("rm", "-f", *ns, "null")
