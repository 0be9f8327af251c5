"""One monitor: it must not die and must stay small, so it does next to nothing itself.

It reaps the container's processes, holds their descriptors, keeps the order of what is told, and passes frames. Every
operation that parses, mounts, opens or runs something is done by a worker that it forks for it (worker.py): a worker
starts with everything the monitor knows, may block, may fail, and takes its memory along when it ends.
"""

from __future__ import annotations

import os
import select

from wherry_task.monitor import cgroups, libc, operations, pump, records, wire, worker
from wherry_task.monitor.clients import Client, Clients

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Args = dict[str, Any]

VERSION = 1
EMPTY, CREATED, RUNNING, PAUSED, STOPPED, DELETED = "empty", "created", "running", "paused", "stopped", "deleted"
_LAST_WORDS_TICKS = 100  # of 20 ms
_DRAIN_TICKS = 500  # 10 s, containerd's bound for output that nobody reads

_LAUNCHING = ("create", "start", "exec")
# One at a time and in the order of arrival: each changes the state that the next one finds.
_EXCLUSIVE = ("create", "start", "delete", "pause", "resume", "update", "checkpoint")
_AT_ANY_TIME = ("exec", "state", "resize", "kill_all")
_AFTERWARDS = {"create": CREATED, "start": RUNNING, "resume": RUNNING, "pause": PAUSED}

_NO_REPORT = [b"0", b"0"]
_KEYS_MAX = 8  # signals that were sent, by the keys of their requests
_OOM_TICKS = 10  # the kernel wakes us before it kills, and without a kill too
_WORKER_DIED = b'{"code":13,"message":"the worker died; monitor.log in the bundle may tell why"}'


class Process:
    """The init (named "") or an exec. `pid` is 0 until it runs; `exit` is its record's JSON once that is on disk."""

    __slots__ = ("ended", "exit", "held", "logger", "master", "name", "pid", "pumps", "stdin", "told", "waiters")

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = 0
        self.ended = False
        self.exit = b""
        self.told = False
        self.stdin = -1
        self.master = -1
        self.logger = 0
        self.held: list[int] = []
        self.pumps: list[pump.Pump] = []
        self.waiters: list[Callable[[], None]] = []

    @property
    def alive(self) -> bool:
        """Whether there is a process, ours to signal: it is not reaped, so its pid is its own."""
        return self.pid > 0 and not self.ended


class Job:
    """What a worker was forked for, and who waits for it; None where nobody does."""

    __slots__ = ("client", "key", "name", "operation", "request")

    def __init__(self, operation: str, name: str, client: Client | None, request: Any, key: Any) -> None:
        self.operation = operation
        self.name = name
        self.client = client
        self.request = request
        self.key = key


class Monitor(Clients):
    """Serves until its container is deleted, or until nobody is left who could ask it to make one."""

    __slots__ = (
        "_busy", "_early", "_jobs", "_keys", "_launching", "_leaving", "_notices", "_queue", "_removed", "_workers",
        "init", "logs", "oom_file", "oom_kills", "processes", "sequence", "shared_pids", "signals", "state",
    )  # fmt: skip

    def __init__(self, signals: int) -> None:
        super().__init__()
        self.state = EMPTY
        self.init = Process("")
        self.processes = {"": self.init}
        self.sequence = 0
        self.oom_kills = 0
        self.oom_file = ""
        self.shared_pids = False
        self.logs: dict[str, pump.LogFile] = {}
        self._leaving = False
        self._removed = False
        self._jobs: dict[int, Job] = {}
        self._workers: set[int] = set()
        self._launching = 0
        self._early: dict[int, int] = {}
        self._notices: list[tuple[int, str, bytes]] = []
        self._queue: list[tuple[str, str, Args, Client]] = []
        self._busy = False
        self._keys: list[str] = []
        self.signals = signals

    # -- clients --------------------------------------------------------------------------------------------------

    def begin(self, fd: int, launched: bool, report: bytes, fds: list[int]) -> None:
        """Take over what the first worker has made for the client on `fd` (beginning.py): a place, and a container."""
        self.watch(self.signals, select.POLLIN, self._signalled)
        _, pid, _, *roles = report.partition(b"\n")[0].split(b"\t")
        self.settle(*fds[:4])
        self._launched(self.init, int(pid), roles, fds[4:])
        client = self.clients[fd] = Client(fd, bytearray())
        client.watching = launched
        self.state = CREATED if launched else EMPTY
        self.watch(fd, select.POLLIN, self.received)

    def found(self, pid: int, status: int) -> None:
        """A process that ended before we looked at signals."""
        self._reaped(pid, status)
        self._tell()

    def left(self) -> None:
        """A client has gone; a monitor without a container that nobody holds would stay for ever."""
        if not self.clients and self.state == EMPTY and not self._launching:
            self.stop()

    # -- requests -------------------------------------------------------------------------------------------------

    def request(self, client: Client, args: Args) -> None:
        """Do it here if it is little, else in a worker; what changes the state waits for its turn."""
        operation, name = args.get("op"), args.get("exec_id") or ""
        if not isinstance(name, str) or not isinstance(operation, str):
            raise wire.Failure(wire.INVALID, "op and exec_id must be strings")
        if operation in _EXCLUSIVE:
            self._queue.append((operation, name, args, client))
            self._next()
        elif operation == "watch":
            self._add_watcher(client, args)
        elif operation == "wait":
            self._wait(client, args, self._find(name))
        elif operation == "kill" and args.get("key") and args["key"] in self._keys:
            self.send(client, wire.reply(args.get("id"), b""))
        elif operation == "kill" and not args.get("all"):
            self._kill(client, args, self._find(name))
        elif operation == "close_stdin":
            self._close_stdin(self._find(name))
            self.send(client, wire.reply(args.get("id"), b""))
        elif operation == "shutdown":
            if self.state not in (EMPTY, DELETED):
                raise wire.Failure(wire.PRECONDITION, f"the container is {self.state}")
            self.send(client, wire.reply(args.get("id"), b""))
            self._leave()
        else:
            operation = "kill_all" if operation == "kill" else operation
            if operation not in _AT_ANY_TIME:
                raise wire.Failure(wire.UNIMPLEMENTED, f"operation {operation[:40]!r}")
            self._work(operation, name, args, client)

    def _next(self) -> None:
        """Begin the first of the waiting exclusive operations, if none is under way."""
        while self._queue and not self._busy:
            operation, name, args, client = self._queue.pop(0)
            try:
                if operation == "delete":
                    self._delete(name, args, client)
                else:
                    self._work(operation, name, args, client)
            except wire.Failure as failure:
                self.send(client, wire.refusal(args.get("id"), failure.body()))

    def _find(self, name: str) -> Process:
        process = self.processes.get(name)
        if process is None or self.state == EMPTY:
            raise wire.Failure(wire.NOT_FOUND, f"process {name[:80] or 'init'}")
        return process

    def _add_watcher(self, client: Client, args: Args) -> None:
        after = _number(args, "after")
        self.send(client, wire.reply(args.get("id"), b'{"seq":%d}' % self.sequence))
        for sequence, _, frame in self._notices:
            if sequence > after:
                self.send(client, frame)
        client.watching = True

    def _wait(self, client: Client, args: Args, process: Process) -> None:
        def tell() -> None:
            self.send(client, wire.reply(args.get("id"), process.exit))

        if process.told:
            tell()
        else:
            process.waiters.append(tell)

    def _kill(self, client: Client, args: Args, process: Process) -> None:
        signal = _number(args, "signal")
        if not process.alive:
            raise wire.Failure(wire.NOT_FOUND, f"process {process.name or 'init'} has ended or not begun")
        try:
            # An unreaped child of ours: its pid cannot have passed to another process, so no runtime is asked.
            os.kill(process.pid, signal)
        except OSError as error:
            raise wire.failure_of(error, f"signal {signal}") from None
        self._sent(args.get("key"))
        if self.state == PAUSED and signal == libc.SIGKILL:
            self._queue.append(("resume", "", args, client))  # a frozen process dies once it is thawed
            self._next()
        else:
            self.send(client, wire.reply(args.get("id"), b""))

    def _sent(self, key: Any) -> None:
        """A signal of this key was sent: a second delivery sends none."""
        if key:
            self._keys = [*self._keys[1 - _KEYS_MAX :], key]

    def _close_stdin(self, process: Process) -> None:
        if process.stdin >= 0:
            os.close(process.stdin)
            process.stdin = -1

    # -- workers --------------------------------------------------------------------------------------------------

    def _work(self, operation: str, name: str, args: Args, client: Client | None) -> None:
        """Fork a worker. Raises Failure when the operation is out of place or no process is to be had."""
        if operation == "exec":
            if name in self.processes:
                raise wire.Failure(wire.EXISTS, f"exec {name[:80]!r} exists")
            self.processes[name] = Process(name)
        try:
            mine, its = libc.message_pair()
            pid = os.fork()
        except OSError as error:
            if operation == "exec":
                del self.processes[name]
            raise wire.failure_of(error, "fork") from None
        if not pid:
            worker.main(self, its, operation, name, args)
        os.close(its)
        self._workers.add(pid)
        self._jobs[mine] = Job(operation, name, client, args.get("id"), args.get("key"))
        self._launching += operation in _LAUNCHING
        self._busy |= operation in _EXCLUSIVE
        self.watch(mine, select.POLLIN, self._reported)

    def _reported(self, fd: int, events: int) -> None:
        """A worker's one message: `1|0 pid role...` with tabs, a newline, the reply. Roles say what the fds are for."""
        try:
            message, fds = libc.receive(fd)
        except OSError:
            message, fds = b"", []
        self.unwatch(fd)
        os.close(fd)
        job = self._jobs.pop(fd)
        head, _, body = message.partition(b"\n")
        done, pid, *roles = head.split(b"\t") if head else _NO_REPORT
        if done == b"1":
            self._succeeded(job, int(pid), roles, fds, body)
        elif job.operation == "exec":
            del self.processes[job.name]
        if job.client is not None:
            say = wire.reply if done == b"1" else wire.refusal
            self.send(job.client, say(job.request, body or _WORKER_DIED))
        self._launching -= job.operation in _LAUNCHING
        if not self._launching:
            self._early.clear()
        if job.operation in _EXCLUSIVE:
            self._busy = False
            self._next()
        # Whatever was held back until the reply had gone out follows it.
        self._tell()

    def _succeeded(self, job: Job, pid: int, roles: list[bytes], fds: list[int], body: bytes) -> None:
        operation = job.operation
        if operation == "kill_all":
            self._sent(job.key)
        elif operation == "exited":
            self.processes[job.name].exit = body
        elif operation == "delete":
            self.state = DELETED
            self._leave()
        elif operation in _LAUNCHING:
            self._launched(self.processes[job.name], pid, roles, fds)
        if operation in _AFTERWARDS:
            self.state = STOPPED if self.init.ended else _AFTERWARDS[operation]

    def _launched(self, process: Process, pid: int, roles: list[bytes], fds: list[int]) -> None:
        self._attach(process, roles, fds)
        # A started init was known, and may have ended, before; a created, restored or executed process is new.
        if pid and not process.pid:
            process.pid = pid
            if pid in self._early:
                self._ended(process, self._early.pop(pid))

    def settle(self, directory: int, lock: int, listener: int, namespace: int) -> None:
        """Take over the place that the first worker prepared; `lock` is only held, as long as this process lives."""
        libc.enter_mounts(namespace)
        os.fchdir(directory)
        os.close(namespace)
        os.close(directory)
        self.watch(listener, select.POLLIN, self.accept)

    def _attach(self, process: Process, roles: list[bytes], fds: list[int]) -> None:
        """Keep what the worker opened for the process."""
        for role in roles:
            if role == b"hold":
                process.held.append(fds.pop(0))
            elif role == b"stdin":
                process.stdin = fds.pop(0)
            elif role == b"master":
                process.master = fds.pop(0)
            elif role == b"oom":
                self.watch(fds.pop(0), select.POLLIN, self._oom_event)
            elif role == b"shared":
                self.shared_pids = True
            elif role.startswith(b"logger:"):
                pid = int(role[7:])
                process.logger = 0 if self._early.pop(pid, None) is not None else pid
            elif role.startswith(b"counter:"):
                self.oom_file = role[8:].decode()
            else:
                process.pumps.append(pump.make(self, role, fds))

    def busy(self) -> bool:
        """Whether a worker is at work."""
        return bool(self._jobs)

    # -- ends -----------------------------------------------------------------------------------------------------

    def _signalled(self, fd: int, _: int) -> None:
        if os.read(fd, 128)[0] == libc.SIGTERM:
            self._terminate()
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid in self._workers:
                    self._workers.remove(pid)
                else:
                    self._reaped(pid, status)
        except ChildProcessError:
            return
        finally:
            self._tell()

    def _reaped(self, pid: int, status: int) -> None:
        for process in self.processes.values():
            if process.logger == pid:
                process.logger = 0
                return
            if process.pid == pid and not process.ended:
                self._ended(process, status)
                return
        # While a runtime runs, any child may turn out to be the one that its worker will report.
        if self._launching:
            self._early[pid] = status

    def _ended(self, process: Process, status: int) -> None:
        """Have the exit written down; nobody is told before it is."""
        code = os.waitstatus_to_exitcode(status)
        code = 128 - code if code < 0 else code
        process.ended = True
        if process.name or not self.shared_pids:
            if not process.name:
                self._count_kills()
            process.exit = operations.record_exit(self, process, code)
        else:
            try:
                self._work("exited", "", {"status": code}, None)
            except wire.Failure:
                self.pending.append(lambda: self._ended_again(process, status))
        if not process.name and self.state in (RUNNING, PAUSED):
            self.state = STOPPED

    def _ended_again(self, process: Process, status: int) -> bool:
        # No process was to be had. The exit is not lost: this comes back until it is written.
        self._ended(process, status)
        return True

    def _tell(self) -> None:
        """Tell what may be told: each exit once, and the init's after every exec's."""
        last = True
        for process in list(self.processes.values()):
            if process.name:
                if process.exit and not process.told:
                    self._tell_one(process)
                last &= process.told
        if last and self.init.exit and not self.init.told and not self._launching:
            self.state = STOPPED
            self._tell_one(self.init)
            self._remove_early()

    def _remove_early(self) -> None:
        """Take away what an ended container leaves while the service writes its end down: `delete` is what comes next.

        Not while a worker may still look at it, nor while output is to be passed on, which must not wait for this.
        """
        used = self._jobs or any(each.pumps or each.logger for each in self.processes.values())
        if self.state == STOPPED and not used:
            self._removed = operations.remove(self)

    def _tell_one(self, process: Process) -> None:
        process.told = True
        self._notice(b"exit", process.name, process.exit)
        waiters, process.waiters = process.waiters, []
        for resume in waiters:
            resume()
        if self._leaving and not process.name:
            self._leave()

    def _notice(self, kind: bytes, name: str, body: bytes) -> None:
        self.sequence += 1
        frame = wire.frame(b'{"notice":"%b","seq":%d,%b' % (kind, self.sequence, body[1:]))
        self._notices.append((self.sequence, name, frame))
        for client in list(self.clients.values()):
            if client.watching:
                self.send(client, frame)

    def _oom_event(self, fd: int, _: int) -> None:
        try:
            os.read(fd, 4096)
        except OSError:
            return
        before, ticks = self.oom_kills, iter(range(_OOM_TICKS))

        def counted() -> bool:
            self._count_kills()
            return self.init.ended or self.oom_kills > before or next(ticks, None) is None

        if not counted():
            self.pending.append(counted)

    def _count_kills(self) -> None:
        kills = cgroups.oom_kills(self.oom_file) if self.oom_file else 0
        if kills > self.oom_kills:
            self.oom_kills = kills
            # Of several the last is enough, so that their number does not grow what is kept.
            self._notices = [old for old in self._notices if old[1] != "*"]
            self._notice(b"oom", "*", b'{"kills":%d}' % kills)

    # -- going away -----------------------------------------------------------------------------------------------

    def _delete(self, name: str, args: Args, client: Client) -> None:
        """Forget an exec that has ended, or have the container taken away; with `force` it is killed first."""
        process = self._find(name)
        if process.name and not process.pid:
            raise wire.Failure(wire.PRECONDITION, f"exec {name} is being started")
        if process.pid and not process.told:
            if process.alive and not args.get("force"):
                raise wire.Failure(wire.PRECONDITION, f"process {name or 'init'} has not ended")
            if process.alive:
                libc.kill(process.pid, libc.SIGKILL)
            process.waiters.append(lambda: self._delete_told(process, args, client))
            if self.state == PAUSED:
                self._work("resume", "", {}, None)
            return
        self._delete_told(process, args, client)

    def _delete_told(self, process: Process, args: Args, client: Client) -> None:
        for each in process.pumps:
            each.release()
        if self._drained(process):
            self._delete_drained(process, args, client)
            return
        ticks = iter(range(_DRAIN_TICKS))

        def again() -> bool:
            if not self._drained(process) and next(ticks, None) is not None:
                return False
            self._delete_drained(process, args, client)
            return True

        self._busy = True
        self.pending.append(again)

    @staticmethod
    def _drained(process: Process) -> bool:
        """Whether all that it wrote has come to where it belongs; its logger then ends by itself."""
        return all([each.drained() for each in process.pumps]) and not process.logger

    def _delete_drained(self, process: Process, args: Args, client: Client) -> None:
        self._busy = False
        self._close(process)
        if process.name:
            self.processes.pop(process.name, None)
            self._notices = [old for old in self._notices if old[1] != process.name]
            records.remove(records.exit_path(process.name))
            self.send(client, wire.reply(args.get("id"), process.exit))
            self._next()
            return
        try:
            if self._removed or (self.init.ended and operations.remove(self)):
                self.state = DELETED
                self.send(client, wire.reply(args.get("id"), self.init.exit))
                self._leave()
            else:
                self._work("delete", "", args, client)
        except wire.Failure as failure:
            self.send(client, wire.refusal(args.get("id"), failure.body()))

    def _close(self, process: Process) -> None:
        self._close_stdin(process)
        for each in process.pumps:
            each.close()
        for fd in process.held:
            os.close(fd)
        if process.master >= 0:
            os.close(process.master)
        if process.logger:
            libc.kill(process.logger, libc.SIGKILL)
        process.pumps, process.held, process.master = [], [], -1

    def _terminate(self) -> None:
        # The machine goes down, and the container got the same signal: stay to write down how it ends.
        self._leaving = True
        if self.state in (EMPTY, DELETED) or self.init.told:
            self._leave()

    def _leave(self) -> None:
        """End once every client has what was sent to it, and soon even if one does not take it."""
        ticks = iter(range(_LAST_WORDS_TICKS))

        def unless_said() -> bool:
            if any(client.outbox for client in self.clients.values()) and next(ticks, None) is not None:
                return False
            self.stop()
            return True

        self.pending.append(unless_said)

    def stop(self) -> None:
        """End the run after this round, and be no longer to be found."""
        super().stop()
        records.remove(operations.SOCKET)


def _number(args: Args, key: str) -> int:
    value = args.get(key) or 0
    if not isinstance(value, int) or value < 0:
        raise wire.Failure(wire.INVALID, f"{key} must be a number")
    return value
