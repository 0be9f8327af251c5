"""Proof that a run left nothing behind: no process, no mount, no cgroup, no runtime state of its own.

Linux, with /proc. A `Watch` makes this process the reaper of everything that it starts, however deep and however
detached: what is still alive under it at the end was left behind by somebody.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_SAMPLE = 0.02  # seconds between looks: shorter than any container lives
_RUNTIME_STATE = ("/run/crun", "/run/runc", "/run/youki")


def _text(path: str) -> str:
    """A file of /proc; empty where the process has gone meanwhile."""
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _processes() -> Iterator[str]:
    return (name for name in os.listdir("/proc") if name.isdigit())


def descendants(of: int) -> dict[int, str]:
    """The living processes under `of`, with their command lines; zombies are gone for everyone but their parent."""
    parents: dict[int, int] = {}
    for name in _processes():
        fields = _text(f"/proc/{name}/stat").rpartition(")")[2].split()
        if fields and fields[0] not in "ZX":
            parents[int(name)] = int(fields[1])
    found: dict[int, str] = {}
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != of:
            ancestor = parents[ancestor]
        if ancestor == of and pid != of:
            found[pid] = _text(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
    return found


def _cgroup_mounts() -> dict[str, str]:
    """Where each hierarchy is mounted, by what /proc/<pid>/cgroup calls it: its controllers, or `` for v2."""
    mounts: dict[str, str] = {}
    for line in _text("/proc/self/mounts").splitlines():
        _, place, kind, options, *_ = line.split(" ")
        if kind == "cgroup2":
            mounts[""] = place
        elif kind == "cgroup":
            for option in options.split(","):
                mounts[option] = place
    return mounts


def _cgroups(pid: int, mounts: dict[str, str]) -> Iterator[str]:
    """The directories of the cgroups of one process."""
    for line in _text(f"/proc/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = mounts.get(controllers.split(",")[0])
        if mount is not None:
            yield mount + path.rstrip("/")


def _all_cgroups(mounts: dict[str, str]) -> set[str]:
    return {directory for mount in set(mounts.values()) for directory, _, _ in os.walk(mount)}


class Watch:
    """Remembers what there was, and from then on what belongs to this process's descendants.

    `place` is the directory that everything of the run lies under. Used as a context manager around the run;
    `leftovers()` is asked behind it, before `place` is removed.
    """

    def __init__(self, place: Path) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "cannot become the reaper of orphaned children")
        self._place = str(place)
        self._mounts = _cgroup_mounts()
        self._before = _all_cgroups(self._mounts)
        self._already = set(descendants(os.getpid()))
        self._cgroups: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(_SAMPLE):
            for pid in descendants(os.getpid()):
                for cgroup in _cgroups(pid, self._mounts):
                    while cgroup not in self._before and len(cgroup) > 1:
                        self._cgroups.add(cgroup)
                        cgroup = os.path.dirname(cgroup)

    @property
    def seen_cgroups(self) -> frozenset[str]:
        """The cgroups that the run made, as far as a process was seen in them or below them."""
        return frozenset(self._cgroups)

    def leftovers(self, patience: float = 5.0) -> list[str]:
        """One line for each thing that is still there after at most `patience` seconds."""
        deadline = time.monotonic() + patience
        while (found := self._now()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _now(self) -> list[str]:
        return [
            *(f"process {pid}: {command}" for pid, command in sorted(self._alive().items())),
            *(f"mount {line.split(' ')[4]}" for line in self._mounted()),
            *(f"cgroup {path}" for path in sorted(self._cgroups) if os.path.isdir(path)),
            *(f"runtime state {path}" for path in self._runtime_state()),
        ]

    def _alive(self) -> dict[int, str]:
        found = {pid: command for pid, command in descendants(os.getpid()).items() if pid not in self._already}
        for name in _processes():
            traces = (_text(f"/proc/{name}/cmdline"), _link(f"/proc/{name}/cwd"), _link(f"/proc/{name}/root"))
            if int(name) != os.getpid() and any(self._place in trace for trace in traces):
                found[int(name)] = traces[0].replace("\0", " ").strip()
        return found

    def _mounted(self) -> list[str]:
        return [line for line in _text("/proc/self/mountinfo").splitlines() if self._place in line]

    def _runtime_state(self) -> Iterator[str]:
        for base in map(Path, _RUNTIME_STATE):
            for path in base.glob("*/*"):
                if path.is_file() and self._place in _text(str(path)):
                    yield str(path.parent)
