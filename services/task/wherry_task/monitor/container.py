"""The rules of one container's life: what may follow what, and that each exit is told once, in order, after the disk."""

from __future__ import annotations

import fcntl
import os
import time

from wherry_task.monitor import cgroups, libc, mounts, records, wire
from wherry_task.monitor.process import Process, identifier, number, text, words
from wherry_task.monitor.runtime import Runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from wherry_task.monitor.loop import Loop, Task

    Args = dict[str, Any]

EMPTY, CREATING, CREATED, RUNNING, PAUSED, STOPPED, DELETED = (
    "empty", "creating", "created", "running", "paused", "stopped", "deleted",
)  # fmt: skip
_TIOCSWINSZ = 0x5414
_DRAIN_SECONDS = 10.0  # containerd's bound for output that nobody reads


class Container:
    """Every method that is an operation of the protocol takes the request and gives the reply, or is a Task of it."""

    def __init__(self, loop: Loop, runtime: Runtime, about: dict[str, Any], notify: Callable[[Args], None]) -> None:
        self.state = EMPTY
        self.init = Process("")
        self.execs: dict[str, Process] = {}
        self._loop = loop
        self._runtime = runtime
        self._about = about
        self._notify = notify
        self._bundle: str = about["bundle"]
        self._rootfs = os.path.join(self._bundle, "rootfs")
        self._early: dict[int, tuple[int, int]] = {}
        self._launching = 0
        self._own_pid_namespace = True
        self._release = False
        self._restore: Args | None = None
        self._oom: cgroups.OomWatch | None = None

    # -- creating and starting ------------------------------------------------------------------------------------

    def create(self, args: Args) -> Task[Args]:
        """Mount the root file system and make the container; its init waits for `start`."""
        if self.state != EMPTY:
            raise wire.Failure(wire.EXISTS, f"container {self._about['container']} is {self.state}")
        self.state = CREATING
        self.init = Process("")
        try:
            mounts.mount_rootfs(_mount_list(args), self._rootfs)
            if args.get("restore"):
                self._restore = args
            else:
                flags = ["--bundle", self._bundle, *words(args, "flags")]
                yield from self._launch(self.init, "create", flags, args, log="log.json")
                self._adopt_init()
        except BaseException:
            yield from self._undo_create()
            raise
        self._release = not args.get("poststart")
        self.state = CREATED
        self._settle(self.init)
        return {"pid": self.init.pid, "cgroups": self._about["cgroups"]}

    def _undo_create(self) -> Task[None]:
        if self.init.pid:
            # The runtime did its part, so this id is ours to take away; without a pid it may be someone else's.
            try:
                yield from self._runtime.run("delete", "--force")
            except wire.Failure:
                libc.kill(self.init.pid, libc.SIGKILL)
        mounts.unmount_rootfs(self._rootfs)
        self.init = Process("")
        self.state = EMPTY

    def _adopt_init(self) -> None:
        pid = self.init.pid
        self._about["cgroups"] = cgroups.of(pid)
        self._about["init"] = {"pid": pid, "start_time": start_time(pid)}
        records.write(records.ABOUT, self._about, durable=False)
        self._own_pid_namespace = _first_of_its_namespace(pid)
        self._oom = cgroups.OomWatch(self._loop, self._about["cgroups"], self._out_of_memory)

    def start(self, args: Args) -> Task[Args]:
        """Let the init run the container's program, or restore the checkpoint that `create` was given."""
        if self.state != CREATED or self.init.exit:
            raise wire.Failure(wire.PRECONDITION, f"cannot start a {self.state} container")
        self.init.held = True
        self.state = CREATING
        try:
            if self._restore:
                yield from self._start_restore(self._restore)
            elif not (self._release and (yield from self._runtime.release(self.init.ended))):
                yield from self._runtime.run("start", log="log.json")
        except BaseException:
            self.state = STOPPED if self.init.exit else CREATED
            raise
        else:
            self.state = STOPPED if self.init.exit else RUNNING
        finally:
            self._settle(self.init)
        return {"pid": self.init.pid}

    def _start_restore(self, args: Args) -> Task[None]:
        where: Args = args["restore"]
        flags = ["--detach", "--bundle", self._bundle, "--image-path", text(where, "image"), *words(where, "flags")]
        if where.get("work"):
            flags += ["--work-path", text(where, "work")]
        yield from self._launch(self.init, "restore", flags, args, log="log.json")
        self._adopt_init()

    def exec(self, args: Args) -> Task[Args]:
        """Run one more process in the container; its OCI process object lies in a file of the bundle."""
        exec_id, spec = identifier(args, "exec_id"), identifier(args, "process")
        if self.state not in (CREATED, RUNNING) or self.init.exit:
            raise wire.Failure(wire.PRECONDITION, f"cannot exec in a {self.state} container")
        if exec_id in self.execs:
            raise wire.Failure(wire.EXISTS, f"exec {exec_id} exists")
        process = self.execs[exec_id] = Process(exec_id)
        try:
            yield from self._launch(process, "exec", ["--process", spec, "--detach"], args)
        except BaseException:
            if process.pid:
                libc.kill(process.pid, libc.SIGKILL)
            del self.execs[exec_id]
            raise
        finally:
            self._settle(process)
        return {"pid": process.pid}

    def _launch(self, process: Process, verb: str, flags: list[str], args: Args, log: str = "") -> Task[None]:
        # While a runtime runs, any child may turn out to be the process that it reports: exits are kept by pid.
        self._launching += 1
        try:
            yield from process.launch(self._loop, self._runtime, verb, flags, args, log)
            early = self._early.pop(process.pid, None)
        finally:
            self._launching -= 1
            if not self._launching:
                self._early.clear()
        if early:
            self._ended(process, *early)

    # -- ends -----------------------------------------------------------------------------------------------------

    def child_exited(self, pid: int, status: int) -> None:
        """A child that is no runtime command has ended: the init, an exec, or an orphan of the container."""
        now = time.time_ns()
        for process in (self.init, *self.execs.values()):
            if process.pid == pid and not process.exit:
                self._ended(process, status, now)
                return
        if self._launching:
            self._early[pid] = (status, now)

    def _ended(self, process: Process, status: int, when: int) -> None:
        if self._oom:
            self._oom.check()
        process.exit = {"id": process.exec_id, "pid": process.pid, "exit_status": status, "exited_at": when}
        if process is self.init:
            process.exit["oom"] = bool(self._oom and self._oom.kills and status == 128 + libc.SIGKILL)
            if self.state in (RUNNING, PAUSED):
                self.state = STOPPED
            if not self._own_pid_namespace:
                self._loop.start(self._runtime.run("kill", "--all", tail="KILL"), lambda _, error: None)
        try:
            records.write(records.exit_path(process.exec_id), process.exit)
        except OSError as error:
            # Better told from memory than never; the service sees that the disk does not have it.
            process.exit["not_durable"] = str(error)
        self._tell()

    def _settle(self, process: Process) -> None:
        """From the next round on, after the reply in hand has gone out, the process's exit may be told."""

        def release() -> None:
            process.held = False
            self._tell()

        self._loop.after(0, release)

    def _tell(self) -> None:
        """Tell what may be told: each exit once, an exec's before the init's."""
        for process in list(self.execs.values()):
            self._tell_one(process)
        if all(process.told for process in self.execs.values()):
            self._tell_one(self.init)

    def _tell_one(self, process: Process) -> None:
        if process.exit and not process.told and not process.held:
            process.told = True
            if process is self.init and self.state != DELETED:
                self.state = STOPPED
            self._notify({"notice": "exit", **process.exit})
            waiters, process.waiters = process.waiters, []
            for resume in waiters:
                self._loop.sleep(0)(resume)

    def _out_of_memory(self) -> None:
        self._notify({"notice": "oom", "id": ""})

    def wait(self, args: Args) -> Task[Args]:
        """The exit of a process, once it has one: now or later."""
        process = self._process(args)
        if not process.told:
            yield process.until_told
        return dict(process.exit or {})

    # -- the running container ------------------------------------------------------------------------------------

    def kill(self, args: Args) -> Task[Args]:
        """Send a signal to one process, or with `all` to every process of the container."""
        process, signal = self._process(args), number(args, "signal", 0, 64)
        if args.get("all"):
            yield from self._runtime.run("kill", "--all", tail=str(signal))
            return {}
        if process.exit or not process.pid:
            raise wire.Failure(wire.NOT_FOUND, f"process {process.exec_id or 'init'} has ended or not begun")
        # An unreaped child of ours: its pid cannot have passed to another process, so no runtime is asked.
        os.kill(process.pid, signal)
        if self.state == PAUSED and signal == libc.SIGKILL:
            yield from self.resume({})  # a frozen process would die only once it is thawed
        return {}

    def pause(self, args: Args) -> Task[Args]:
        """Freeze every process of the container."""
        if self.state != RUNNING:
            raise wire.Failure(wire.PRECONDITION, f"cannot pause a {self.state} container")
        yield from self._runtime.run("pause")
        self.state = STOPPED if self.init.exit else PAUSED
        return {}

    def resume(self, args: Args) -> Task[Args]:
        """Let a paused container go on."""
        if self.state != PAUSED:
            raise wire.Failure(wire.PRECONDITION, f"cannot resume a {self.state} container")
        yield from self._runtime.run("resume")
        self.state = STOPPED if self.init.exit else RUNNING
        return {}

    def update(self, args: Args) -> Task[Args]:
        """Change the limits: `resources` is an OCI LinuxResources object."""
        if self.state not in (CREATED, RUNNING, PAUSED):
            raise wire.Failure(wire.PRECONDITION, f"cannot update a {self.state} container")
        records.write("resources.json", args.get("resources") or {}, durable=False)
        yield from self._runtime.run("update", "--resources", "resources.json")
        return {}

    def checkpoint(self, args: Args) -> Task[Args]:
        """Write a CRIU image of the container; without the flag --leave-running it ends."""
        if self.state not in (RUNNING, PAUSED):
            raise wire.Failure(wire.PRECONDITION, f"cannot checkpoint a {self.state} container")
        flags = ["--image-path", text(args, "image"), *words(args, "flags")]
        if args.get("work"):
            flags += ["--work-path", text(args, "work")]
        yield from self._runtime.run("checkpoint", *flags)
        return {}

    def resize(self, args: Args) -> Args:
        """Set the size of a process's terminal."""
        width, height = number(args, "width", 0, 65535), number(args, "height", 0, 65535)
        process = self._process(args)
        if process.stdio is None or process.stdio.master < 0:
            raise wire.Failure(wire.PRECONDITION, "the process has no terminal")
        size = height.to_bytes(2, "little") + width.to_bytes(2, "little") + bytes(4)
        fcntl.ioctl(process.stdio.master, _TIOCSWINSZ, size)
        return {}

    def close_stdin(self, args: Args) -> Args:
        """Close the held writing end of a process's stdin."""
        process = self._process(args)
        if process.stdio is not None:
            process.stdio.close_stdin()
        return {}

    def describe(self, args: Args) -> Args:
        """Everything that a service needs to adopt the container again."""
        return {
            "state": self.state,
            **self.init.describe(),
            "execs": {exec_id: process.describe() for exec_id, process in self.execs.items()},
            **{key: self._about[key] for key in ("container", "bundle", "runtime", "root", "options", "cgroups")},
            "monitor": os.getpid(),
        }

    # -- deleting -------------------------------------------------------------------------------------------------

    def delete(self, args: Args) -> Task[Args]:
        """Forget an exec that has ended, or take the container away; the bundle's files stay, but an exec's record."""
        process = self._process(args)
        if not process.exit and not args.get("force"):
            raise wire.Failure(wire.PRECONDITION, f"process {process.exec_id or 'init'} is {self.state}")
        if process is self.init and self.state in (EMPTY, CREATING, DELETED):
            raise wire.Failure(wire.PRECONDITION, f"cannot delete a {self.state} container")
        if not process.exit and process.pid:
            yield from self.kill({"exec_id": process.exec_id, "signal": libc.SIGKILL})
        if not process.told and process.pid:
            yield process.until_told
        if process.exec_id:
            yield from self._delete_exec(process)
        else:
            yield from self._delete_container()
        return dict(process.exit or {})

    def _delete_exec(self, process: Process) -> Task[None]:
        yield from self._drain(process)
        records.remove(records.exit_path(process.exec_id))
        self.execs.pop(process.exec_id, None)

    def _delete_container(self) -> Task[None]:
        before, self.state = self.state, DELETED
        try:
            yield from self._drain(self.init)
            if self.init.pid:
                yield from self._runtime_delete()
        except BaseException:
            self.state = before
            raise
        if self._oom:
            self._oom.close()
        for process in self.execs.values():
            if process.stdio:
                process.stdio.close()
        mounts.unmount_rootfs(self._rootfs)

    def _runtime_delete(self) -> Task[None]:
        try:
            yield from self._runtime.run("delete", log="log.json")
        except wire.Failure:
            # Forced, a runtime also forgives what is gone already and what will not die by itself.
            yield from self._runtime.run("delete", "--force", log="log.json")

    def _drain(self, process: Process) -> Task[None]:
        if process.stdio is None:
            return
        deadline = time.monotonic() + _DRAIN_SECONDS
        while not process.stdio.drained() and time.monotonic() < deadline:
            yield self._loop.sleep(0.02)
        process.stdio.close()

    def _process(self, args: Args) -> Process:
        exec_id = text(args, "exec_id")
        if not exec_id:
            if self.state == EMPTY:
                raise wire.Failure(wire.NOT_FOUND, f"container {self._about['container']} is not created")
            return self.init
        if exec_id not in self.execs:
            raise wire.Failure(wire.NOT_FOUND, f"exec {exec_id}")
        return self.execs[exec_id]


def _mount_list(args: Args) -> list[dict[str, Any]]:
    value = args.get("mounts") or []
    if not isinstance(value, list) or not all(isinstance(each, dict) and each.get("type") for each in value):
        raise wire.Failure(wire.INVALID, "mounts must be a list of {type, source, options}")
    return value


def _first_of_its_namespace(pid: int) -> bool:
    """Whether the process is pid 1 of a namespace of its own: the kernel then ends the others with it."""
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith("NSpid:"):
                    numbers = line.split()[1:]
                    return len(numbers) > 1 and numbers[-1] == "1"
    except OSError:
        return True  # gone already, and who is left of a shared namespace is killed by delete
    return False


def start_time(pid: int) -> str:
    """The kernel's start time of a process, in clock ticks since boot: with the pid it names one process for good."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read(4096).rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
