"""What has to be done after a monitor that died: kill, unmount, delete, and write down how it ended."""

from __future__ import annotations

import os
import time

from wherry_task.monitor import cgroups, compact, libc, mounts, operations, records, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Args = dict[str, Any]

_ROUNDS, _PAUSE = 200, 0.02
_DYING_SECONDS = 1.0
DIED = {"exit_status": 128 + libc.SIGKILL, "shim_died": True}


def main(fd: int, args: Args) -> None:
    """Clean the bundle that the request names, and answer on the connection."""
    libc.rename_process(b"wherry-cleanup")
    try:
        frame = wire.reply(args.get("id"), compact.dumps(_clean(args)))
    except wire.Failure as failure:
        frame = wire.refusal(args.get("id"), failure.body())
    except OSError as error:
        frame = wire.refusal(args.get("id"), wire.failure_of(error, "cleanup").body())
    os.write(fd, frame)


def _clean(request: Args) -> Args:
    """Returns {exits, warnings}. Raises Failure, with EXISTS when a monitor is alive. May be repeated at will."""
    about = operations.describe_bundle(request)
    operations.enter_bundle(about["bundle"])
    if request.get("kill"):
        _kill(_written_by_the_monitor().get("monitor") or {})  # it hangs, or is about to end
    # A killed monitor's connections end a moment before its lock: who asks at once shall not be refused.
    operations.lock_bundle(patience=_DYING_SECONDS)
    # The monitor may have known its directories by other names.
    about |= {**_written_by_the_monitor(), "bundle": about["bundle"], "root": about["root"]}
    warnings: list[str] = []
    own = cgroups.own(about.get("cgroups") or _cgroups_of_spec())
    _kill(about.get("init") or {})
    _empty(own, warnings)
    mounts.unmount_rootfs(os.path.join(about["bundle"], "rootfs"))  # of a monitor without a namespace of its own
    mounts.enter_namespace(os.getcwd())
    _runtime_delete(about, warnings)
    _remove_cgroups(own, warnings)
    records.remove(operations.SOCKET)
    _write_missing_exits(about.get("init") or {})
    return {"exits": records.exits(), "warnings": warnings}


def end_cgroups(path: str) -> list[str]:
    """Kill all that runs in a container's cgroups, and remove them; answers what of that could not be done."""
    own, warnings = cgroups.own(dict.fromkeys(cgroups.of("self"), path)), list[str]()
    _empty(own, warnings)
    _remove_cgroups(own, warnings)
    return warnings


def _written_by_the_monitor() -> Args:
    try:
        return records.read(records.ABOUT)
    except (OSError, ValueError):
        return {}  # it died before it wrote anything: the request says enough


def _cgroups_of_spec() -> dict[str, str]:
    """Where the spec puts the container, for a monitor that died before its runtime was done creating it."""
    try:
        path = records.read("config.json")["linux"]["cgroupsPath"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    # A systemd name (slice:prefix:name) is systemd's to remove.
    if not isinstance(path, str) or not path.startswith("/") or os.path.normpath(path) != path:
        return {}
    return dict.fromkeys(cgroups.of("self"), path)


def _kill(known: Args) -> None:
    """A process by its pid and start time."""
    pid = known.get("pid")
    if not pid:
        return
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    # Only after the pidfd is open does an equal start time prove that it is still the same process.
    if operations.start_time(pid) == known.get("start_time"):
        libc.kill(pid, libc.SIGKILL)
    os.close(fd)


def _empty(own: dict[str, str], warnings: list[str]) -> None:
    """Kill every process of the container's cgroups and wait until they are gone, 4 seconds at most."""
    folders = [cgroups.folder(*item) for item in own.items()]
    for folder in folders:
        _write(f"{folder}/cgroup.kill", "1")
        _write(f"{folder}/cgroup.freeze", "0")
        _write(f"{folder}/freezer.state", "THAWED")
    for _ in range(_ROUNDS):
        pids = {pid for folder in folders for pid in _members(folder)}
        if not pids:
            return
        for pid in pids:
            libc.kill(pid, libc.SIGKILL)
        time.sleep(_PAUSE)
    warnings.append(f"{len(pids)} processes do not die")


def _members(folder: str) -> list[int]:
    found: list[int] = []
    for where, _, _ in os.walk(folder):
        try:
            with open(f"{where}/cgroup.procs") as file:
                found += [int(line) for line in file]
        except OSError:
            continue
    return [pid for pid in found if pid > 0]


def _write(path: str, value: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY)
    except OSError:
        return
    try:
        os.write(fd, value.encode())
    except OSError:
        return
    finally:
        os.close(fd)


def _runtime_delete(about: Args, warnings: list[str]) -> None:
    try:
        operations.runtime_of(about).run("delete", "--force")
    except wire.Failure as failure:
        warnings.append(failure.message)


def _remove_cgroups(own: dict[str, str], warnings: list[str]) -> None:
    for item in own.items():
        for where, _, _ in os.walk(cgroups.folder(*item), topdown=False):
            for _ in range(_ROUNDS):
                try:
                    os.rmdir(where)
                except FileNotFoundError:
                    break
                except OSError as error:  # EBUSY: a killed process is not gone altogether yet
                    reason = error.strerror
                    time.sleep(_PAUSE)
                else:
                    break
            else:
                warnings.append(f"{where}: {reason}")


def _write_missing_exits(init: Args) -> None:
    """The init's exit, unless its monitor had recorded it: nobody can know the status of what nobody reaped."""
    path = records.exit_path("")
    if init.get("pid") and not os.path.exists(path):
        records.write(path, {"id": "", "pid": init["pid"], "exited_at": time.time_ns(), "oom": False, **DIED})
