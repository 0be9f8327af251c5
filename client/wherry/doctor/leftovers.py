"""What runs, is mounted or lies about on a node, held against what its services know of."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wherry_shared.api.task import Process
from wherry_shared.bus import sockets
from wherry_shared.errors import InvalidArgument, NotFound

from ..client import Client
from ..paging import walk
from .afar import namespaces
from .findings import Check, Finding, Patient, Place

MONITOR = "wherry-monitor"
MONITOR_SECONDS = 2.0
# What is being made or removed at this moment looks left over; so it is looked at again.
AGAIN_SECONDS = 1.0
CGROUPS = Path("/sys/fs/cgroup")
_SNAPSHOT = re.compile(r"/snapshot/([\w-]+)/snapshots/(\d+)(?=/|$)")

Key = tuple[str, str]
"""A namespace and a container's id."""


@dataclass(frozen=True)
class Left:
    """Something that belongs to a container: where it is, and what it is."""

    key: Key
    what: str
    where: str
    todo: str


# ---- tasks and their monitors


async def monitors(patient: Patient) -> Iterable[Finding]:
    """Beside every task that has not ended stands a monitor that answers."""
    found = []
    for namespace in await namespaces(patient.bus):
        client = patient.bus.within(namespace)
        for process in await walk(client.tasks.walk):
            bundle = _bundles(patient.here) / namespace / process.container_id
            error = await asyncio.to_thread(_silent, bundle) if process.status != "stopped" else ""
            if error and await _still_runs(client, process):
                found.append(
                    Finding(
                        "broken", "monitors", f"the monitor of {process.container_id} in {namespace} is gone or hangs",
                        error, f"wherry rm -f -n {namespace} {process.container_id}; it ends what is left of it",
                    )
                )  # fmt: skip
    return found


async def _still_runs(client: Client, process: Process) -> bool:
    """The task service sees a monitor's end by itself, in a moment."""
    await asyncio.sleep(AGAIN_SECONDS)
    try:
        return (await client.tasks.get(process.container_id)).status != "stopped"
    except NotFound:
        return False


def _silent(bundle: Path) -> str:
    """Why a bundle's monitor does not answer; "" when it does, or when a shim v2 stands in its place.

    Frames are a big-endian length and JSON (the task service's monitor/README.md); `state` changes nothing.
    """
    if not bundle.is_dir():
        return f"{bundle} is not there"
    if (bundle / "bootstrap.json").exists() or (bundle / "shim.json").exists():
        return ""
    question = json.dumps({"id": 1, "op": "state"}).encode()
    try:
        with sockets.connect(bundle / "monitor.sock") as sock:
            sock.settimeout(MONITOR_SECONDS)
            sock.sendall(len(question).to_bytes(4, "big") + question)
            return "" if sock.recv(4) else "it ends the connection"
    except OSError as e:
        return f"{bundle / 'monitor.sock'}: {e}"


# ---- what belongs to no task


async def leftovers(patient: Patient) -> Iterable[Finding]:
    """Every monitor, bundle, cgroup and runtime's state belongs to a task."""
    suspects = await asyncio.to_thread(lambda: {left.where: left for left in _all(patient.here)})
    suspects = await _without_task(patient.bus, suspects)
    if suspects:
        await asyncio.sleep(AGAIN_SECONDS)
        again = {left.where for left in await asyncio.to_thread(lambda: list(_all(patient.here)))}
        suspects = await _without_task(patient.bus, {k: v for k, v in suspects.items() if k in again})
    return [
        Finding("broken", "left over", f"{left.what} of no task: {' '.join(left.key)}", left.where, left.todo)
        for left in suspects.values()
    ]


async def _without_task(client: Client, found: dict[str, Left]) -> dict[str, Left]:
    known: set[Key] = set()
    for namespace in {left.key[0] for left in found.values()}:
        with suppress(InvalidArgument):  # it is no namespace: nothing in it is a task's
            tasks = await walk(client.within(namespace).tasks.walk)
            known |= {(namespace, process.container_id) for process in tasks}
    return {where: left for where, left in found.items() if left.key not in known}


def _all(place: Place) -> Iterator[Left]:
    yield from _processes(place)
    for bundle in _bundles(place).glob("*/*"):
        todo = "restart the task service, which clears it away"
        yield Left((bundle.parent.name, bundle.name), "a bundle", str(bundle), todo)
    for state in (place.state / "task" / "runtimes").glob("*/*/*"):
        todo = f"{state.parts[-3]} --root {state.parent} delete --force {state.name}"
        yield Left((state.parent.name, state.name), "a runtime's state", str(state), todo)
    for base in _cgroups(place):
        for cgroup in base.glob("*/*"):
            if cgroup.is_dir():
                yield Left((cgroup.parent.name, cgroup.name), _kind(cgroup), str(cgroup), _clearing(cgroup))


def _processes(place: Place) -> Iterator[Left]:
    """Monitors of this node: they work in their bundles."""
    home = f"{_bundles(place)}/"
    for pid in pids():
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() != MONITOR:
                continue
            bundle = os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)")
            if bundle.startswith(home):
                namespace, _, container = bundle.removeprefix(home).partition("/")
                yield Left((namespace, container), "a monitor", f"process {pid} in {bundle}", f"kill {pid}")


def _bundles(place: Place) -> Path:
    return place.state / "task" / "tasks"


def _cgroups(place: Place) -> list[Path]:
    """Where the task service puts the cgroups of this node, in every hierarchy."""
    own = hashlib.sha256(str(place.state / "task").encode()).hexdigest()[:12]
    hierarchies = [CGROUPS, *(path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink())]
    return [path for path in (root / f"wherry-{own}" for root in hierarchies) if path.is_dir()]


def _kind(cgroup: Path) -> str:
    with suppress(OSError):
        count = len((cgroup / "cgroup.procs").read_text().split())
        if count:
            return f"a cgroup with {count} processes"
    return "a cgroup"


def _clearing(cgroup: Path) -> str:
    return f"end the processes in {cgroup}/cgroup.procs, if there are any, and rmdir {cgroup}"


def pids() -> list[int]:
    """Every process."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


# ---- mounts


async def mounts(patient: Patient) -> Iterable[Finding]:
    """What is mounted of the snapshots' directories, in any mount namespace, belongs to a snapshot."""
    seen = await asyncio.to_thread(_mounted, patient.here)
    unknown = await _unknown(patient, seen)
    if unknown:
        await asyncio.sleep(AGAIN_SECONDS)
        again = await asyncio.to_thread(_mounted, patient.here)
        unknown = await _unknown(patient, {k: v for k, v in again.items() if k in unknown})
    return [
        Finding(
            "broken", "mounts", f"directory {number} of snapshotter {name} is mounted, and is no snapshot's", where,
            "end the process, or unmount it (nsenter --mount --target PID umount DIRECTORY)",
        )
        for (name, number), where in sorted(unknown.items())
    ]  # fmt: skip


async def _unknown(patient: Patient, seen: dict[Key, str]) -> dict[Key, str]:
    """Those that no snapshot's mounts name. A committed snapshot is not mounted by itself."""
    known: set[Key] = set()
    for namespace in await namespaces(patient.bus) if seen else ():
        client = patient.bus.within(namespace)
        for snapshotter in {name for name, _ in seen}:
            for info in await walk(client.snapshots.walk, snapshotter=snapshotter):
                if info.kind != "committed":
                    with suppress(NotFound):
                        for mount in await client.snapshots.mounts(snapshotter, info.name):
                            known |= _named([mount.source, *mount.options])
    return {key: where for key, where in seen.items() if key not in known}


def _named(words: Iterable[str]) -> set[Key]:
    return {key for word in words for path in word.split(":") for key in _SNAPSHOT.findall(path)}


def _mounted(place: Place) -> dict[Key, str]:
    """The snapshots' directories that are mounted, by snapshotter and number: by which process, and where."""
    found: dict[Key, str] = {}
    looked: set[str] = set()
    roots = _roots(place.root)
    for pid in [os.getpid(), *pids()]:
        with suppress(OSError):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in looked:
                continue
            looked.add(namespace)
            for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
                for key in uppers(line, roots):
                    found.setdefault(key, f"{line.split(' ')[4]} in the mount namespace of process {pid}")
    return found


def _roots(root: Path) -> set[str]:
    """How mountinfo may name the directory: by its path, or by that on its file system."""
    top = next(parent for parent in (root, *root.parents) if os.path.ismount(parent))
    inside = root.relative_to(top)
    return {str(root), f"/{inside}" if inside.parts else ""}


def uppers(line: str, roots: Iterable[str]) -> list[Key]:
    """The snapshots' directories that a line of mountinfo (proc(5)) stands on at the top: an overlay's upper directory,
    or the source of a bind mount. roots: what may stand before `/snapshot`."""
    before, _, after = line.partition(" - ")
    if after.startswith("overlay "):
        options = after.split(" ")[-1].split(",")
        paths = [option.removeprefix("upperdir=") for option in options if option.startswith("upperdir=")]
    else:
        paths = before.split(" ")[3:4]
    found = [(path[: match.start()], match[1], match[2]) for path in paths if (match := _SNAPSHOT.search(path))]
    return [(name, number) for root, name, number in found if root in roots]


CHECKS = (
    Check("monitors", monitors, ("namespace", "task"), here=True),
    Check("left over", leftovers, ("task",), here=True),
    Check("mounts", mounts, ("namespace", "snapshot"), here=True),
)
