"""The cgroups of a container, as /proc/PID/cgroup names them: who is in them, and out-of-memory kills."""

from __future__ import annotations

import os
import select

from wherry_task.monitor import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from wherry_task.monitor.loop import Loop

ROOT = "/sys/fs/cgroup"


def of(pid: int | str) -> dict[str, str]:
    """Controllers ("" for v2, "memory", "cpu,cpuacct", "name=systemd") to paths; {} when the process is gone."""
    found = {}
    try:
        with open(f"/proc/{pid}/cgroup") as file:
            for line in file:
                _, controllers, path = line.rstrip("\n").split(":", 2)
                found[controllers] = path
    except OSError:
        return {}
    return found


def own(cgroups: dict[str, str]) -> dict[str, str]:
    """Those of the cgroups that are not ours too and not above ours: a container without its own shares its parent's."""
    ours = of("self")
    return {
        controllers: path
        for controllers, path in cgroups.items()
        if path != "/" and not (ours.get(controllers, "") + "/").startswith(path.rstrip("/") + "/")
    }


def folder(controllers: str, path: str) -> str:
    """The directory of a cgroup in the usual layout of /sys/fs/cgroup, v1, v2 or hybrid."""
    if controllers:
        return f"{ROOT}/{controllers.removeprefix('name=')}{path}"
    unified = f"{ROOT}/unified"
    return (unified if os.path.isdir(unified) else ROOT) + path


class OomWatch:
    """Counts kills by the kernel's out-of-memory killer in one memory cgroup and calls `told` when there are more."""

    def __init__(self, loop: Loop, cgroups: dict[str, str], told: Callable[[], None]) -> None:
        """Watches nothing where the container has no memory cgroup of its own."""
        self._loop = loop
        self._told = told
        self._fds: list[int] = []
        self._file = ""
        memory = {key: path for key, path in own(cgroups).items() if key == "" or "memory" in key.split(",")}
        try:
            for controllers in sorted(memory, reverse=True):  # v1 first: on a hybrid host v2 has no memory controller
                where = folder(controllers, memory[controllers])
                file = f"{where}/memory.oom_control" if controllers else f"{where}/memory.events"
                if os.path.exists(file):
                    self._start(where, file, bool(controllers))
                    break
        except OSError:
            self.close()  # a container that is gone already, or no permission: no notices, the exit is still told
        self.kills = self._count()

    def _start(self, where: str, file: str, legacy: bool) -> None:
        self._file = file
        if not legacy:
            self._fds = [libc.watch_modifications(file)]
        else:
            event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._fds = [event, os.open(file, os.O_RDONLY)]
            with open(f"{where}/cgroup.event_control", "w") as control:
                control.write(f"{event} {self._fds[1]}")
        self._loop.watch(self._fds[0], select.POLLIN, self._ready)

    def _count(self) -> int:
        if not self._file:
            return 0
        try:
            with open(self._file) as file:
                return sum(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
        except OSError:
            return 0

    def _ready(self, _: int) -> None:
        try:
            os.read(self._fds[0], 4096)
        except BlockingIOError:
            return
        self.check()

    def check(self) -> None:
        """Look at the counter now: the kernel tells before it kills, and tells nothing about the last kill of all."""
        count = self._count()
        if count > self.kills:
            self.kills = count
            self._told()

    def close(self) -> None:
        """Stop watching; a second call does nothing."""
        for fd in self._fds:
            self._loop.unwatch(fd)
            os.close(fd)
        self._fds = []
