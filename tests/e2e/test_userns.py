"""Containers whose root is nobody on the node: their files, their commands, and what becomes an image."""

from __future__ import annotations

import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from node import Node

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
