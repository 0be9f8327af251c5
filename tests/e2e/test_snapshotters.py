"""A container on every snapshotter, with a whole node: what is named is mounted, run in, committed and unmounted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from backends import BackendName, chosen_backends
from grounds import btrfs_disk
from images import Registry, layers
from node import Node

Verbs = list[str]


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node where btrfs has a pool of its own, mounted where its directories are to be."""
    base = tmp_path_factory.mktemp("pooled")
    (base / "root/snapshot").mkdir(parents=True, mode=0o700)
    try:
        with btrfs_disk(base / "root/snapshot/btrfs"):
            node = Node(base)
            before = node.mounts()
            try:
                yield node.start()
            finally:
                node.stop()
            assert node.mounts() == before
    except OSError as e:
        pytest.skip(str(e))


@pytest.fixture(params=chosen_backends("snapshot"))
def place(pooled: Node, namespace: str, request: pytest.FixtureRequest) -> Verbs:
    """Options of a namespace whose default is the snapshotter."""
    snapshotter: BackendName = request.param
    plugin = next(p for p in pooled.json("info")["plugins"] if p["id"] == snapshotter and "snapshot" in p["type"])
    if plugin.get("init_error"):
        snapshotter.refuse(plugin["init_error"])
    pooled.run("ns", "create", namespace, f"containerd.io/defaults/snapshotter={snapshotter}")
    return ["-n", namespace]


@pytest.fixture(scope="session")
def layers_ref(registry: Registry) -> str:
    return registry.push(layers(), "library/layers", "1")


def test_a_container_runs(pooled: Node, place: Verbs, busybox_ref: str) -> None:
    run = [
        "run",
        *place,
        "--rm",
        busybox_ref,
        "sh",
        "-c",
        "echo x > /new && cat /new && rm /bin/cat && ls /bin | wc -l",
    ]
    first = pooled.run(*run).stdout.split()
    assert first[0] == "x" and first == pooled.run(*run).stdout.split(), "a container changes the image of the next"
    assert [s["kind"] for s in pooled.json("snapshot", "ls", *place)] == ["committed"]


def test_a_container_on_many_layers(pooled: Node, place: Verbs, layers_ref: str) -> None:
    pooled.run("pull", *place, layers_ref, timeout=120)
    found = pooled.json("snapshot", "ls", *place)
    assert len(found) == 20 and {s["kind"] for s in found} == {"committed"}
    usage = pooled.json("snapshot", "usage", *place)
    assert len(usage) == 20 and all(u["inodes"] > 0 for u in usage)


def test_the_verbs(pooled: Node, place: Verbs, tmp_path: Path) -> None:
    made = pooled.json("snapshot", "prepare", *place, "key", "--label", "a=1")
    assert made == pooled.json("snapshot", "mounts", *place, "key")
    pooled.run("snapshot", "label", *place, "key", "a=", "b=2")
    known = pooled.json("snapshot", "info", *place, "key")
    assert (known["kind"], known["labels"]["b"], "a" in known["labels"]) == ("active", "2", False)
    assert pooled.run("snapshot", "commit", *place, "base", "key").stdout == "base\n"
    pooled.run("snapshot", "view", *place, "look", "--parent", "base")
    assert pooled.run("snapshot", "tree", *place).stdout.splitlines() == ["base", "  look  (view)"]
    assert pooled.json("snapshot", "usage", *place, "base")["inodes"] >= 1
    refused = pooled.run("snapshot", "rm", *place, "base", check=False)
    assert refused.returncode == 1 and "remove" in refused.stderr
    pooled.run("snapshot", "rm", *place, "look", "base")
    assert pooled.json("snapshot", "ls", *place) == []
