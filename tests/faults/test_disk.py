"""A full disk: a clear error, what runs goes on, and removing still works."""

from __future__ import annotations

import os
from pathlib import Path

from images import Registry, redis
from node import Node, eventually, small_disk


def test_full_disk(registry: Registry, busybox_ref: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "96M") as disk:
        made = Node(disk).start()
        try:
            made.run("run", "-d", "--name", "before", busybox_ref, "sleep", "1000")
            pid = made.json("ps")[0]["pid"]
            fill(disk / "filler")
            refused = made.run("pull", registry.push(redis(), "library/redis", "7"), check=False)
            assert refused.returncode == 1
            assert "resource exhausted" in refused.stderr.lower() or "no space" in refused.stderr.lower()
            assert "Traceback" not in refused.stderr
            assert os.path.exists(f"/proc/{pid}")
            assert made.run("exec", "before", "echo", "alive", check=False).stdout in ("alive\n", "")
            old = made.kill("nats-server")
            eventually(lambda: made.pids().get("nats-server", old) != old, "the bus does not come back")
            made.run("tag", busybox_ref, "spare:1", check=False)
            made.run("rm", "-f", "before")
            assert made.json("ps", "-a") == []
            made.run("prune", "--all", "--yes")
            assert made.json("images") == [] and made.json("content", "ls") == []
            (disk / "filler").unlink()
            assert made.run("run", "--rm", busybox_ref, "echo", "room").stdout == "room\n"
        finally:
            made.stop()


def fill(path: Path) -> None:
    """Take all the room there is, down to the last block."""
    with path.open("wb", buffering=0) as f:
        size = 1 << 20
        while size >= 512:
            try:
                f.write(b"\0" * size)
            except OSError:
                size //= 2
