"""What the workers do: one function per operation, given the monitor as of the fork, the exec id and the arguments.

They check the state that they found - the monitor lets only one of those run at a time that change it - and raise
Failure. Everything here runs in the bundle's directory.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time

from wherry_task.monitor import cgroups, compact, libc, mounts, records, wire
from wherry_task.monitor.console import ConsoleSocket
from wherry_task.monitor.runtime import Runtime
from wherry_task.monitor.stdio import Stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from wherry_task.monitor.monitor import Monitor, Process

    Args = dict[str, Any]

SOCKET, LOCK, LOG = "monitor.sock", "monitor.lock", "log.json"
_EMPTY, _CREATED, _RUNNING, _PAUSED = "empty", "created", "running", "paused"
_TIOCSWINSZ = 0x5414
_ID_BYTES = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


class Result:
    """What a worker reports: the reply's JSON, a pid or a count, and descriptors for the monitor to keep."""

    def __init__(self, body: Args | bytes, pid: int = 0, kept: Sequence[tuple[str, list[int]]] = ()) -> None:
        self.body = body if isinstance(body, bytes) else compact.dumps(body)
        self.pid = pid
        self.kept = kept
        self.done = True


def refused(failure: wire.Failure) -> Result:
    """The report of an operation that failed."""
    result = Result(failure.body())
    result.done = False
    return result


# -- the bundle ---------------------------------------------------------------------------------------------------


def spawn(monitor: Monitor, name: str, args: Args) -> Result:
    """Prepare the place in which the monitor will work; it takes it over by the descriptors."""
    about = describe_bundle(args)
    enter_bundle(about["bundle"])
    lock = lock_bundle()
    mounts.enter_namespace(os.getcwd())
    os.makedirs(records.EXITS, 0o700, exist_ok=True)
    about["monitor"] = {"pid": os.getppid(), "start_time": start_time(os.getppid())}
    records.write(records.ABOUT, about)
    records.remove(SOCKET)
    listener = wire.listen(SOCKET)
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    return Result({"pid": os.getppid(), "version": 1}, kept=[("place", [here, lock, listener, namespace])])


def launch(monitor: Monitor, name: str, args: Args) -> Result:
    """Spawn and create in one: half the forks and one question less on the way of every new container."""
    place = spawn(monitor, name, args)
    made = create(monitor, name, args)
    return Result(made.body, made.pid, [*place.kept, *made.kept])


def describe_bundle(args: Args) -> Args:
    """What a spawn or a cleanup says of a container, checked. Raises Failure."""
    found: Args = {key: text(args, key) for key in ("bundle", "container", "runtime", "root")}
    for key in ("bundle", "root"):
        if not found[key].startswith("/") or os.path.normpath(found[key]) != found[key]:
            raise wire.Failure(wire.INVALID, f"{key} {found[key]!r} must be a clean absolute path")
    if not found["runtime"]:
        raise wire.Failure(wire.INVALID, "runtime is missing")
    identifier(found["container"], "container")
    return {**found, "options": words(args, "options"), "cgroups": {}, "oom_file": ""}


def enter_bundle(path: str) -> None:
    """Make the bundle the working directory. Raises Failure unless it is ours alone to write."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise wire.failure_of(error, f"bundle {path}") from None
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise wire.Failure(wire.DENIED, f"bundle {path} can be written by others")
    os.fchdir(fd)
    os.close(fd)


def lock_bundle(patience: float = 0.0) -> int:
    """Hold the working directory's bundle, as its monitor or cleaner, for as long as the fd lives. Raises Failure."""
    fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise wire.Failure(wire.EXISTS, "the bundle has a living monitor or is being cleaned") from None
            time.sleep(0.01)
        else:
            return fd


def runtime_of(about: Args) -> Runtime:
    """The runtime that a bundle's description names."""
    return Runtime(about["runtime"], about["root"], about["container"], about["options"])


# -- creating and starting ----------------------------------------------------------------------------------------


def create(monitor: Monitor, name: str, args: Args) -> Result:
    """Mount the root file system and make the container; its init waits for `start`, which may have to restore it."""
    if monitor.state != _EMPTY:
        raise wire.Failure(wire.EXISTS, f"the container is {monitor.state}")
    about = records.read(records.ABOUT)
    runtime, rootfs = runtime_of(about), os.path.join(about["bundle"], "rootfs")
    mounts.mount_rootfs(mount_list(args), rootfs)
    about["poststart"] = bool(args.get("poststart"))
    about["plain"] = bool(args.get("plain")) and runtime.releases and not about["options"]
    try:
        if args.get("restore"):
            about["restore"] = args
            records.write(records.ABOUT, about)
            return Result({"pid": 0, "cgroups": {}})
        flags = ["--bundle", about["bundle"], *words(args, "flags")]
        return _init_result(about, runtime, *_launch(runtime, "create", "init", flags, args, LOG))
    except BaseException:
        mounts.unmount_rootfs(rootfs)
        raise


def _init_result(about: Args, runtime: Runtime, pid: int, stdio: Stdio) -> Result:
    """Write down what a cleaner would need, and watch the memory cgroup."""
    about["cgroups"] = cgroups.of(pid)
    about["init"] = {"pid": pid, "start_time": start_time(pid)}
    about["own_pid_namespace"] = first_of_its_namespace(pid)
    about["oom_file"] = cgroups.memory(about["cgroups"])
    kept = stdio.kept if about["own_pid_namespace"] else [*stdio.kept, ("shared", [])]
    try:
        records.write(records.ABOUT, about)
        kept = [*kept, *_oom_watch(about["oom_file"])]
    except OSError:
        runtime.run("delete", "--force")
        raise
    return Result({"pid": pid, "cgroups": about["cgroups"]}, pid, kept)


def _oom_watch(file: str) -> list[tuple[str, list[int]]]:
    try:
        return [("oom", [cgroups.watch_memory(file)]), (f"counter:{file}", [])] if file else []
    except FileNotFoundError:
        return []  # the init has ended already and its cgroup is gone


def start(monitor: Monitor, name: str, args: Args) -> Result:
    """Let the init run the container's program, or restore the checkpoint that `create` was given."""
    about = _expect(monitor, "start", (_CREATED,))
    runtime = runtime_of(about)
    if about.get("restore"):
        return _restore(about, runtime)
    pid = monitor.init.pid
    if about["poststart"] or not runtime.release(pid):
        runtime.run("start", log=LOG)
    return Result({"pid": pid}, pid)


def _restore(about: Args, runtime: Runtime) -> Result:
    args: Args = about["restore"]
    where: Args = args["restore"]
    flags = ["--detach", "--bundle", about["bundle"], "--image-path", text(where, "image"), *words(where, "flags")]
    if where.get("work"):
        flags += ["--work-path", text(where, "work")]
    return _init_result(about, runtime, *_launch(runtime, "restore", "init", flags, args, LOG))


def execute(monitor: Monitor, name: str, args: Args) -> Result:
    """Run one more process in the container; its OCI process object lies in a file of the bundle."""
    identifier(name, "exec id")
    spec = identifier(text(args, "process"), "process")
    if monitor.state not in (_CREATED, _RUNNING) or monitor.init.ended:
        raise wire.Failure(wire.PRECONDITION, f"cannot exec in a {monitor.state} container")
    runtime = runtime_of(records.read(records.ABOUT))
    flags = ["--process", spec, "--detach"]
    pid, stdio = _launch(runtime, "exec", f"exec-{name}", flags, args, "")
    return Result({"pid": pid}, pid, stdio.kept)


def _launch(runtime: Runtime, verb: str, name: str, flags: list[str], args: Args, log: str) -> tuple[int, Stdio]:
    """Open the streams, run the verb, learn the pid. On Failure the process that it may have made is killed."""
    terminal, pid, pid_file = bool(args.get("terminal")), 0, f"{name}.pid"
    stdio = Stdio(bool(args.get("copy")))
    stdio.open(text(args, "stdin"), text(args, "stdout"), text(args, "stderr"), terminal)
    console = ConsoleSocket(f"{name}.tty") if terminal else None
    try:
        if console:
            flags = [*flags, "--console-socket", console.name]
        runtime.run(verb, *flags, "--pid-file", pid_file, stdio=stdio.child, log=log)
        pid = _read_pid(pid_file)
        if console:
            stdio.attach(console.master())
    except BaseException:
        stdio.abandon()
        if pid:
            libc.kill(pid, libc.SIGKILL)
            if verb != "exec":
                runtime.run("delete", "--force")
        raise
    finally:
        if console:
            console.close()
        if verb == "exec":
            records.remove(pid_file)
    # Closed before the report, so that the client's reply finds the process the only writer.
    for fd in stdio.child:
        os.close(fd)
    return pid, stdio


# -- ends ---------------------------------------------------------------------------------------------------------


def record_exit(monitor: Monitor, process: Process, status: int) -> bytes:
    """Put the exit of a process on record, as its JSON; runs in the monitor itself, for a fork would take longer."""
    words = b'"pid":%d,"exit_status":%d,"exited_at":%d' % (process.pid, status, time.time_ns())
    if not process.name:
        words += b',"oom":true' if monitor.oom_kills and status == 128 + libc.SIGKILL else b',"oom":false'
    record = b'{"id":"%b",%b}' % (process.name.encode(), words)
    try:
        records.write(records.exit_path(process.name), record)
    except OSError as error:
        # Better told from memory than never; the service sees that the disk does not have it.
        record = b'%b,"not_durable":%b}' % (record[:-1], compact.dumps(str(error)))
    return record


def exited(monitor: Monitor, name: str, args: Args) -> Result:
    """The same for an init whose pid namespace is not its own, and who therefore leaves others behind."""
    _kill_the_rest(runtime_of(records.read(records.ABOUT)))
    return Result(record_exit(monitor, monitor.init, args["status"]))


def _kill_the_rest(runtime: Runtime) -> None:
    """Without a pid namespace of its own the kernel does not end the others with the init."""
    try:
        runtime.run("kill", "--all", tail="KILL")
    except wire.Failure:
        return  # nobody is left


def remove(monitor: Monitor) -> bool:
    """Take an ended container away without its runtime, as that would; False where the runtime has to do it.

    Runs in the monitor itself, which has nothing left to do but this. What the runtime would do more - hooks, systemd's
    units, cache allocation - was looked for in the spec by `create`.
    """
    try:
        about = records.read(records.ABOUT)
        if not about.get("plain") or monitor.shared_pids:
            return False
        for item in cgroups.own(about["cgroups"]).items():
            cgroups.remove(cgroups.folder(*item))
        state = runtime_of(about).state
        for name in os.listdir(state):
            os.unlink(f"{state}/{name}")
        os.rmdir(state)
    except (OSError, ValueError):
        return False  # whatever is in the way, the runtime knows better; and it forgives what is gone already
    mounts.unmount_rootfs(os.path.join(about["bundle"], "rootfs"))
    return True


def delete(monitor: Monitor, name: str, args: Args) -> Result:
    """Take the container away; the bundle's files stay. Gives the init's exit, {} if it was never begun."""
    about = records.read(records.ABOUT)
    runtime = runtime_of(about)
    if monitor.init.ended:
        try:
            runtime.run("delete", log=LOG)
        except wire.Failure:
            # Forced, a runtime also forgives what is gone already and what will not die by itself.
            runtime.run("delete", "--force", log=LOG)
    mounts.unmount_rootfs(os.path.join(about["bundle"], "rootfs"))
    return Result(monitor.init.exit or b"{}")


# -- the running container ----------------------------------------------------------------------------------------


def state(monitor: Monitor, name: str, args: Args) -> Result:
    """Everything that a service needs to adopt the container again."""

    def process(each: Process) -> Args:
        return {"pid": each.pid, "exit": compact.loads(each.exit) if each.told else None}

    about = records.read(records.ABOUT)
    return Result({
        "state": _state_of(monitor, about), **process(monitor.init),
        "execs": {each.name: process(each) for each in monitor.processes.values() if each.name},
        **{key: about[key] for key in ("container", "bundle", "runtime", "root", "options", "cgroups")},
        "monitor": os.getppid(), "seq": monitor.sequence, "oom_kills": monitor.oom_kills, "version": 1,
    })  # fmt: skip


def _state_of(monitor: Monitor, about: Args) -> str:
    """The service lets an init go by the exec.fifo without a word to the monitor, which so counts it as created."""
    if monitor.state != _CREATED or about.get("restore"):
        return monitor.state
    runtime = runtime_of(about)
    fifo = os.path.join(runtime.state, "exec.fifo")
    return _RUNNING if runtime.releases and not os.path.lexists(fifo) else monitor.state


def kill_all(monitor: Monitor, name: str, args: Args) -> Result:
    """Send a signal to every process of the container."""
    _expect(monitor, "kill", (_CREATED, _RUNNING, _PAUSED))
    _run("kill", "--all", tail=str(number(args, "signal", 64)))
    return Result({})


def pause(monitor: Monitor, name: str, args: Args) -> Result:
    """Freeze every process of the container."""
    _expect(monitor, "pause", (_RUNNING,))
    _run("pause")
    return Result({})


def resume(monitor: Monitor, name: str, args: Args) -> Result:
    """Let a paused container go on, also for a kill's sake: cgroup v2 then lets frozen processes die before it."""
    try:
        _expect(monitor, "resume", (_PAUSED,))
        _run("resume")
    except wire.Failure:
        if args.get("op") == "resume" or not _has_ended(monitor.init):
            raise
    return Result({})


def _has_ended(process: Process) -> bool:
    """Reaped, or about to be."""
    if process.ended:
        return True
    try:
        with open(f"/proc/{process.pid}/stat") as file:
            return file.read(4096).rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def update(monitor: Monitor, name: str, args: Args) -> Result:
    """Change the limits: `resources` is an OCI LinuxResources object."""
    _expect(monitor, "update", (_CREATED, _RUNNING, _PAUSED))
    records.write("resources.json", args.get("resources") or {})
    try:
        _run("update", "--resources", "resources.json")
    finally:
        records.remove("resources.json")
    return Result({})


def checkpoint(monitor: Monitor, name: str, args: Args) -> Result:
    """Write a CRIU image of the container; without the flag --leave-running it ends."""
    _expect(monitor, "checkpoint", (_RUNNING, _PAUSED))
    flags = ["--image-path", text(args, "image"), *words(args, "flags")]
    if args.get("work"):
        flags += ["--work-path", text(args, "work")]
    _run("checkpoint", *flags)
    return Result({})


def resize(monitor: Monitor, name: str, args: Args) -> Result:
    """Set the size of a process's terminal."""
    process = monitor.processes.get(name)
    if process is None:
        raise wire.Failure(wire.NOT_FOUND, f"process {name or 'init'}")
    if process.master < 0:
        raise wire.Failure(wire.PRECONDITION, "the process has no terminal")
    width, height = (number(args, key, 65535).to_bytes(2, "little") for key in ("width", "height"))
    fcntl.ioctl(process.master, _TIOCSWINSZ, height + width + bytes(4))
    return Result({})


def _expect(monitor: Monitor, verb: str, states: Sequence[str]) -> Args:
    """What is on record of the container, if it is in one of the states. Raises Failure."""
    about: Args = {} if monitor.state == _EMPTY else records.read(records.ABOUT)
    state = _state_of(monitor, about)
    if state not in states or monitor.init.ended:
        raise wire.Failure(wire.PRECONDITION, f"cannot {verb} a {state} container")
    return about


def _run(verb: str, *flags: str, tail: str = "") -> None:
    runtime_of(records.read(records.ABOUT)).run(verb, *flags, tail=tail)


# -- arguments ----------------------------------------------------------------------------------------------------


def text(args: Args, key: str) -> str:
    """A string of the arguments; "" when absent. Raises Failure."""
    value = args.get(key) or ""
    if not isinstance(value, str) or "\0" in value:
        raise wire.Failure(wire.INVALID, f"{key} must be a string")
    return value


def words(args: Args, key: str) -> list[str]:
    """A list of strings of the arguments; [] when absent. Raises Failure."""
    value = args.get(key) or []
    if not isinstance(value, list) or not all(isinstance(word, str) and "\0" not in word for word in value):
        raise wire.Failure(wire.INVALID, f"{key} must be a list of strings")
    return value


def number(args: Args, key: str, most: int) -> int:
    """A required number from 0 to `most`. Raises Failure."""
    value = args.get(key)
    if not isinstance(value, int) or not 0 <= value <= most:
        raise wire.Failure(wire.INVALID, f"{key} must be a number from 0 to {most}")
    return value


def identifier(value: str, what: str) -> str:
    """The value, if it is safe as a name: of a file, and as a runtime's argument. Raises Failure."""
    if not 0 < len(value) <= 140 or value[0] in "._-" or not _ID_BYTES.issuperset(value):
        raise wire.Failure(wire.INVALID, f"{what} {value[:80]!r} is not an identifier")
    return value


def mount_list(args: Args) -> list[Args]:
    """The mounts of a root file system, checked. Raises Failure."""
    value = args.get("mounts") or []
    if not isinstance(value, list) or not all(isinstance(each, dict) and each.get("type") for each in value):
        raise wire.Failure(wire.INVALID, "mounts must be a list of {type, source, options}")
    return value


def _read_pid(path: str) -> int:
    try:
        return int(records.contents(path))
    except (OSError, ValueError) as error:
        raise wire.Failure(wire.UNKNOWN, f"the runtime wrote no usable {path}: {error}") from None


def first_of_its_namespace(pid: int) -> bool:
    """Whether the process is pid 1 of a namespace of its own: the kernel then ends the others with it."""
    try:
        lines = records.contents(f"/proc/{pid}/status").split(b"\n")
    except OSError:
        return True  # gone already, and who is left of a shared namespace is killed by delete
    numbers = next((line.split()[1:] for line in lines if line.startswith(b"NSpid:")), [])
    return len(numbers) > 1 and numbers[-1] == b"1"


def start_time(pid: int) -> str:
    """The kernel's start time of a process, in clock ticks since boot: with the pid it names one process for good."""
    try:
        return records.contents(f"/proc/{pid}/stat").rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""
