"""The cgroups of a container, as /proc/PID/cgroup names them: who is in them, and out-of-memory kills."""

from __future__ import annotations

import os

from wherry_task.monitor import libc, records

ROOT = "/sys/fs/cgroup"


def of(pid: int | str) -> dict[str, str]:
    """Controllers ("" for v2, "memory", "cpu,cpuacct", "name=systemd") to paths; {} when the process is gone."""
    found = {}
    try:
        lines = os.fsdecode(records.contents(f"/proc/{pid}/cgroup")).split("\n")
    except OSError:
        return {}
    for line in filter(None, lines):
        _, controllers, path = line.split(":", 2)
        found[controllers] = path
    return found


def own(cgroups: dict[str, str]) -> dict[str, str]:
    """Those that are neither ours nor above ours: a container without cgroups of its own shares its parent's."""
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


def memory(cgroups: dict[str, str]) -> str:
    """The file that counts the container's out-of-memory kills; "" when it has no memory cgroup of its own."""
    candidates = {key: path for key, path in own(cgroups).items() if key == "" or "memory" in key.split(",")}
    for controllers in sorted(candidates, reverse=True):  # v1 first: a hybrid host's v2 has no memory controller
        where = folder(controllers, candidates[controllers])
        file = f"{where}/memory.oom_control" if controllers else f"{where}/memory.events"
        if os.path.exists(file):
            return file
    return ""


def watch_memory(file: str) -> int:
    """A descriptor that becomes readable when the kernel kills in that cgroup, and now and then without a kill."""
    if file.endswith("/memory.events"):
        return libc.watch_modifications(file)
    event, control = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), os.open(file, os.O_RDONLY)
    try:
        with open(f"{os.path.dirname(file)}/cgroup.event_control", "w") as register:
            register.write(f"{event} {control}")
    except OSError:
        os.close(event)
        raise
    finally:
        os.close(control)
    return event


def oom_kills(file: str) -> int:
    """How many processes the kernel has killed in that cgroup for want of memory; 0 when it is gone."""
    try:
        lines = records.contents(file).split(b"\n")
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(b"oom_kill "))


def remove(folder: str) -> None:
    """Remove a cgroup that is empty, and those below it. Raises OSError, EBUSY where something still runs in it."""
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return
    except OSError:
        below = [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
        if not below:
            raise
        for each in below:
            remove(each)
        os.rmdir(folder)


def mine() -> str:
    """The file that takes a process into our own cgroup; "" where none is to be seen."""
    for controllers, path in of("self").items():
        file = f"{folder(controllers, path)}/cgroup.procs"
        if os.path.exists(file):
            return file
    return ""
