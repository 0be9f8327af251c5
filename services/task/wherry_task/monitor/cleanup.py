"""What has to be done after a monitor that died: kill, unmount, delete, and write down how it ended."""

from __future__ import annotations

import os
import time

from wherry_task.monitor import cgroups, container, libc, monitor, mounts, records, wire
from wherry_task.monitor.loop import Loop
from wherry_task.monitor.runtime import Runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Args = dict[str, Any]

_ROUNDS, _PAUSE = 200, 0.02
DIED = {"exit_status": 128 + libc.SIGKILL, "shim_died": True}


def main(fd: int, request: Args) -> None:
    """Clean the bundle that the request names, and answer on the connection."""
    libc.rename_process("wherry-cleanup")
    try:
        reply: Args = {"id": request.get("id"), "ok": _clean(request)}
    except wire.Failure as error:
        reply = {"id": request.get("id"), "error": {"code": error.code, "message": error.message}}
    except OSError as error:
        failure = wire.failure_of(error, "cleanup")
        reply = {"id": request.get("id"), "error": {"code": failure.code, "message": failure.message}}
    os.write(fd, wire.encode(reply))


def _clean(request: Args) -> Args:
    """Returns {exits, warnings}. Raises Failure, with EXISTS when a monitor is alive. May be repeated at will."""
    about = monitor.about(request)
    monitor.enter_bundle(about["bundle"])
    monitor.lock_bundle()
    try:
        about |= records.read(records.ABOUT)
    except (OSError, ValueError):
        pass  # a monitor that died before it wrote anything: the request says enough  # noqa: S110
    warnings: list[str] = []
    own = cgroups.own(about.get("cgroups") or _cgroups_of_spec())
    _kill_init(about.get("init") or {})
    _empty(own, warnings)
    mounts.unmount_rootfs(os.path.join(about["bundle"], "rootfs"))  # of a monitor without a namespace of its own
    mounts.enter_namespace(os.getcwd())
    _runtime_delete(about, warnings)
    _remove_cgroups(own, warnings)
    records.remove(monitor.SOCKET)
    _write_missing_exits(about.get("init") or {})
    return {"exits": records.exits(), "warnings": warnings}


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


def _kill_init(init: Args) -> None:
    pid = init.get("pid")
    if not pid:
        return
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    # Only after the pidfd is open does an equal start time prove that it is still the same process.
    if container.start_time(pid) == init.get("start_time"):
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
    loop = Loop(lambda pid, status: None, lambda: None)
    runtime = Runtime(loop, about["runtime"], about["root"], about["container"], about["options"])

    def done(_: Any, error: BaseException | None) -> None:
        if error is not None:
            warnings.append(str(error))
        loop.running = False

    loop.start(runtime.run("delete", "--force"), done)
    loop.run()


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
