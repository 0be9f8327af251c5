"""What the tests of snapshots stand on: the real service on a root of the test's own, and real mounts.

Test folders are not packages here: who needs this puts the folder on sys.path, then `from snapshot_rig import ...`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from rebuilt import event_stream
from wherry_lease.__main__ import build as build_leases
from wherry_shared.bus import Bus
from wherry_shared.bus.serve import Server
from wherry_shared.runtime import Host, Settings
from wherry_shared.values import Mount
from wherry_snapshot.__main__ import build
from wherry_snapshot.service import SnapshotService

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="snapshots are made, mounted and removed as root")


def settings(service: str, root: Path, options: dict[str, str] | None = None) -> Settings:
    return Settings(service, "n1", root / "root", root / "state", "", root / "creds", options=options or {})


class House:
    """The snapshot and the lease service on one bus, that can be stopped and built again on the same root."""

    service: SnapshotService
    host: Host

    def __init__(self, bus: Bus, root: Path, options: dict[str, str] | None = None) -> None:
        self.bus, self.root, self.options = bus, root, options
        self._stack = AsyncExitStack()
        self._servers: list[Server] = []

    async def start(self) -> None:
        await event_stream(self.bus)
        self._stack = AsyncExitStack()
        try:
            leases = await build_leases(Host(settings("lease", self.root), self.bus, self._stack))
            self.host = Host(settings("snapshot", self.root, self.options), self.bus, self._stack)
            self.service = await build(self.host)
        except BaseException:
            await self._stack.aclose()
            raise
        metadata = self.host.metadata
        self._servers = [await self.bus.serve(leases), await self.bus.serve(self.service, metadata=metadata)]

    async def stop(self) -> None:
        for server in self._servers:
            await server.drain()
        await self._stack.aclose()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def plugin(self, snapshotter: str) -> dict[str, Any]:
        """What introspection is told of a snapshotter."""
        return next(p for p in json.loads(self.host.metadata["plugins"]) if p["id"] == snapshotter)

    def directories(self, snapshotter: str) -> set[str]:
        """What lies where the backend keeps its snapshots."""
        return set(os.listdir(self.root / "root/snapshot" / snapshotter / "snapshots"))


@contextmanager
def mounted(mounts: Sequence[Mount], target: Path) -> Iterator[Path]:
    """What the service named, really mounted on `target` for the time of the block."""
    target.mkdir(exist_ok=True)
    with ExitStack() as stack:

        def put(mount: Mount, at: Path) -> None:
            _mount(mount, at)
            stack.callback(subprocess.run, ["umount", str(at)], check=True)

        *first, last = mounts
        if last.type == "format/overlay":
            put(Mount(type="tmpfs", source="tmpfs", options=["size=64k"]), target)
            for i, mount in enumerate(first):
                (target / str(i)).mkdir()
                put(mount, target / str(i))
            put(_formatted(last, target), target)
        else:
            for mount in mounts:
                put(mount, target)
        yield target


def _formatted(mount: Mount, places: Path) -> Mount:
    """The mount with the places of those before it in its options: `{{ overlay FIRST LAST }}`."""

    def named(match: re.Match[str]) -> str:
        return ":".join(f"{places}/{i}" for i in range(int(match[1]), int(match[2]) + 1))

    options = [re.sub(r"\{\{ overlay (\d+) (\d+) \}\}", named, o) for o in mount.options]
    return Mount(type=mount.type.removeprefix("format/"), source=mount.source, options=options)


def _mount(mount: Mount, target: Path) -> None:
    options, where = list(mount.options), "/"
    if mount.type == "overlay":
        options, where = _shortened(options)
    command = ["mount", "-t", mount.type, "-o", ",".join(options), mount.source, str(target)]
    if mount.type == "bind":
        command = ["mount", "-o", ",".join(options), mount.source, str(target)]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)[:400]}: {done.stderr}"


def _shortened(options: list[str]) -> tuple[list[str], str]:
    """The options with lower directories told from the one they have in common, as a mounter has to for long lists."""
    result, where = [], "/"
    for option in options:
        name, _, value = option.partition("=")
        if name == "lowerdir" and ":" in value:
            lower = value.split(":")
            where = os.path.commonpath(lower)
            option = "lowerdir=" + ":".join(os.path.relpath(path, where) for path in lower)
        result.append(option)
    return result, where


def tree(path: Path) -> dict[str, Any]:
    """Every path below, with a file's text, a link's target, or None for a directory."""
    found: dict[str, Any] = {}
    for directory, names, files in os.walk(path):
        for name in names + files:
            entry = Path(directory) / name
            key = str(entry.relative_to(path))
            if entry.is_symlink():
                found[key] = f"-> {os.readlink(entry)}"
            else:
                found[key] = entry.read_text() if entry.is_file() else None
    return found
