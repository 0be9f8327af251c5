"""One monitor: it must not die and must stay small, so it does next to nothing itself.

It reaps the container's processes, holds their descriptors, keeps the order of what is told, and passes frames. Every
operation that parses, mounts, opens or runs something is done by a worker that it forks for it (worker.py): a worker
starts with everything the monitor knows, may block, may fail, and takes its memory along when it ends.
"""

from __future__ import annotations

import os
import select

from wherry_task.monitor import libc, pump, records, wire, worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

VERSION = 1
EMPTY, CREATED, RUNNING, PAUSED, STOPPED, DELETED = "empty", "created", "running", "paused", "stopped", "deleted"
_CHUNK = 1 << 16
_TICK = 20  # milliseconds between two looks at what cannot be polled for
_LAST_WORDS_TICKS = 100
_DRAIN_TICKS = 500  # 10 s, containerd's bound for output that nobody reads

_LAUNCHING = (wire.CREATE, wire.START, wire.EXEC)
# One at a time and in the order of arrival: each changes the state that the next one finds.
_EXCLUSIVE = (wire.CREATE, wire.START, wire.DELETE, wire.PAUSE, wire.RESUME, wire.UPDATE, wire.CHECKPOINT)
_AFTERWARDS = {wire.CREATE: CREATED, wire.START: RUNNING, wire.RESUME: RUNNING, wire.PAUSE: PAUSED}


class Process:
    """The init (named b"") or an exec. `pid` is 0 unless it runs; `exit` is its record's JSON once that is on disk."""

    __slots__ = ("ended", "exit", "held", "master", "name", "pid", "pumps", "stdin", "told", "waiters")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.pid = 0
        self.ended = False
        self.exit = b""
        self.told = False
        self.stdin = -1
        self.master = -1
        self.held: list[int] = []
        self.pumps: list[pump.Pump] = []
        self.waiters: list[Callable[[], None]] = []


class Client:
    """One connection of the task service."""

    __slots__ = ("fd", "inbox", "outbox", "watching")

    def __init__(self, fd: int, inbox: bytearray) -> None:
        self.fd = fd
        self.inbox = inbox
        self.outbox = bytearray()
        self.watching = False


class Job:
    """What a worker was forked for, and who waits for it; None where nobody does."""

    __slots__ = ("client", "name", "operation", "request")

    def __init__(self, operation: int, name: bytes, client: Client | None, request: int) -> None:
        self.operation = operation
        self.name = name
        self.client = client
        self.request = request


class Monitor:
    """Serves until its container is deleted, or until nobody is left who could ask it to make one."""

    def __init__(self) -> None:
        self.state = EMPTY
        self.init = Process(b"")
        self.processes = {b"": self.init}
        self.sequence = 0
        self.oom_kills = 0
        self.logs: dict[str, pump.LogFile] = {}
        self._running = True
        self._leaving = False
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[int, int], None]] = {}
        self._clients: dict[int, Client] = {}
        self._jobs: dict[int, Job] = {}
        self._workers: set[int] = set()
        self._launching = 0
        self._early: dict[int, int] = {}
        self._notices: list[tuple[int, bytes, bytes]] = []
        self._queue: list[tuple[int, bytes, bytes, Client, int]] = []
        self._busy = False
        # Called every tick until they return True.
        self._pending: list[Callable[[], bool]] = []
        self._signals = libc.signal_descriptor()
        self.watch(self._signals, select.POLLIN, self._signalled)

    def run(self) -> None:
        """Serve; returns when the work is over."""
        while self._running:
            for fd, events in self._poll.poll(_TICK if self._pending else None):
                # A handler earlier in this round may have closed this one.
                handler = self._handlers.get(fd)
                if handler is not None:
                    try:
                        handler(fd, events)
                    except Exception as error:
                        worker.note(error)  # a mistake here is bad; a container killed by it would be worse
            if self._pending:
                calls, self._pending = self._pending, []
                self._pending += [call for call in calls if not call()]

    def watch(self, fd: int, events: int, handler: Callable[[int, int], None]) -> None:
        """Call the handler with the descriptor and its poll events; replaces an earlier watch."""
        self._handlers[fd] = handler
        self._poll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Must come before the descriptor is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    # -- clients --------------------------------------------------------------------------------------------------

    def begin(self, fd: int, inbox: bytearray, request: int, body: bytes) -> None:
        """Have a worker prepare the place that the request on this connection names; `inbox` was read behind it."""
        client = self._clients[fd] = Client(fd, inbox)
        # Further frames of this client wait until the bundle has been entered.
        self._work(wire.SPAWN, b"", body, client, request)

    def rehearse(self, fd: int, inbox: bytearray, place: list[int]) -> None:
        """As `begin`, but with a place that was prepared already, and with a process that ends at once."""
        client = self._clients[fd] = Client(fd, inbox)
        self._settle(*place)
        self._watch_place = place
        self.watch(fd, select.POLLIN, self._received)
        self._deliver(client)
        pid = os.fork()
        if not pid:
            os._exit(0)
        self.init.pid = pid
        self.state=RUNNING
        def end():
            if not self.init.ended or self._jobs: return False
            self.state=EMPTY
            self._drop(client)
            return True
        self._pending.append(end)
    def close(self):
        for fd in list(self._handlers): self.unwatch(fd); os.close(fd)
        os.close(self._watch_place[1])

    def _accept(self, listener: int, _: int) -> None:
        try:
            fd = libc.accept(listener)
        except OSError:
            return
        self._clients[fd] = Client(fd, bytearray())
        self.watch(fd, select.POLLIN, self._received)

    def _received(self, fd: int, events: int) -> None:
        client = self._clients[fd]
        if events & select.POLLOUT:
            self._flush(client)
        if client.fd < 0 or not events & ~select.POLLOUT:
            return
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        client.inbox += data
        self._deliver(client)

    def _deliver(self, client: Client) -> None:
        try:
            while client.fd >= 0 and (found := wire.take(client.inbox)):
                request, operation, body = found
                name, _, rest = body.partition(b" ")
                try:
                    self._request(client, request, operation, name, rest)
                except wire.Failure as failure:
                    self._fail(client, request, failure)
        except ValueError:
            self._drop(client)

    def _send(self, client: Client, frame: bytes) -> None:
        if client.fd >= 0:
            client.outbox += frame
            self._flush(client)
            if len(client.outbox) > wire.MAX_UNSENT:
                self._drop(client)

    def _fail(self, client: Client, request: int, failure: wire.Failure) -> None:
        self._send(client, wire.frame(request, failure.code, failure.message.encode()))

    def _flush(self, client: Client) -> None:
        try:
            while client.outbox:
                del client.outbox[: os.write(client.fd, client.outbox)]
        except BlockingIOError:
            self.watch(client.fd, select.POLLIN | select.POLLOUT, self._received)
            return
        except OSError:
            self._drop(client)
            return
        self.watch(client.fd, select.POLLIN, self._received)

    def _drop(self, client: Client) -> None:
        if client.fd < 0:
            return
        self.unwatch(client.fd)
        os.close(client.fd)
        del self._clients[client.fd]
        client.fd = -1
        # A monitor without a container that nobody holds would stay for ever.
        if not self._clients and self.state == EMPTY and not self._launching:
            self._stop()

    # -- requests -------------------------------------------------------------------------------------------------

    def _request(self, client: Client, request: int, operation: int, name: bytes, rest: bytes) -> None:
        if operation in _EXCLUSIVE:
            self._queue.append((operation, name, rest, client, request))
            self._next()
        elif operation == wire.WATCH:
            self._add_watcher(client, request, _number(rest or b"0"))
        elif operation == wire.WAIT:
            self._wait(client, request, self._find(name))
        elif operation == wire.KILL:
            self._kill(client, request, self._find(name), _number(rest))
        elif operation == wire.CLOSE_STDIN:
            self._close_stdin(self._find(name))
            self._send(client, wire.frame(request, wire.OK))
        elif operation == wire.SHUTDOWN:
            if self.state not in (EMPTY, DELETED):
                raise wire.Failure(wire.PRECONDITION, f"the container is {self.state}")
            self._send(client, wire.frame(request, wire.OK))
            self._leave()
        elif wire.CREATE <= operation < wire.EXITED:
            self._work(operation, name, rest, client, request)
        else:
            raise wire.Failure(wire.UNIMPLEMENTED, f"operation {operation}")

    def _next(self) -> None:
        """Begin the first of the waiting exclusive operations, if none is under way."""
        while self._queue and not self._busy:
            operation, name, rest, client, request = self._queue.pop(0)
            try:
                if operation == wire.DELETE:
                    self._delete(name, rest, client, request)
                else:
                    self._work(operation, name, rest, client, request)
            except wire.Failure as failure:
                self._fail(client, request, failure)

    def _find(self, name: bytes) -> Process:
        process = self.processes.get(name)
        if process is None or self.state == EMPTY:
            raise wire.Failure(wire.NOT_FOUND, f"process {name.decode(errors='replace') or 'init'}")
        return process

    def _add_watcher(self, client: Client, request: int, after: int) -> None:
        self._send(client, wire.frame(request, wire.OK, b'{"seq":%d}' % self.sequence))
        for sequence, _, frame in self._notices:
            if sequence > after:
                self._send(client, frame)
        client.watching = True

    def _wait(self, client: Client, request: int, process: Process) -> None:
        def tell() -> None:
            self._send(client, wire.frame(request, wire.OK, process.exit))

        if process.told:
            tell()
        else:
            process.waiters.append(tell)

    def _kill(self, client: Client, request: int, process: Process, signal: int) -> None:
        if not process.pid:
            raise wire.Failure(wire.NOT_FOUND, f"process {process.name.decode() or 'init'} has ended or not begun")
        try:
            # An unreaped child of ours: its pid cannot have passed to another process, so no runtime is asked.
            os.kill(process.pid, signal)
        except OSError as error:
            raise wire.failure_of(error, f"signal {signal}") from None
        if self.state == PAUSED and signal == libc.SIGKILL:
            self._queue.append((wire.RESUME, b"", b"", client, request))  # a frozen process dies once it is thawed
            self._next()
        else:
            self._send(client, wire.frame(request, wire.OK))

    def _close_stdin(self, process: Process) -> None:
        if process.stdin >= 0:
            os.close(process.stdin)
            process.stdin = -1

    # -- workers --------------------------------------------------------------------------------------------------

    def _work(self, operation: int, name: bytes, rest: bytes, client: Client | None, request: int) -> None:
        """Fork a worker. Raises Failure when the operation is out of place or no process is to be had."""
        if operation == wire.EXEC:
            if name in self.processes:
                raise wire.Failure(wire.EXISTS, f"exec {name.decode(errors='replace')!r} exists")
            self.processes[name] = Process(name)
        try:
            mine, its = libc.message_pair()
            pid = os.fork()
        except OSError as error:
            if operation == wire.EXEC:
                del self.processes[name]
            raise wire.failure_of(error, "fork") from None
        if not pid:
            worker.main(self, its, operation, name, rest)
        os.close(its)
        self._workers.add(pid)
        self._jobs[mine] = Job(operation, name, client, request)
        self._launching += operation in _LAUNCHING
        self._busy |= operation in _EXCLUSIVE
        self.watch(mine, select.POLLIN, self._reported)

    def _reported(self, fd: int, _: int) -> None:
        """A worker's one message: `status pid role...` with tabs, a newline, the reply. A role says what fds are for."""
        try:
            message, fds = libc.receive(fd)
        except OSError:
            message, fds = b"", []
        self.unwatch(fd)
        os.close(fd)
        job = self._jobs.pop(fd)
        head, _, body = message.partition(b"\n")
        if not head:
            head, body = b"%d\t0" % wire.INTERNAL, b"the worker died; monitor.log in the bundle may tell why"
        words = head.split(b"\t")
        status = int(words[0])
        if status == wire.OK:
            self._succeeded(job, int(words[1]), words[2:], fds, body)
        elif job.operation == wire.EXEC:
            del self.processes[job.name]
        if job.client is not None:
            self._send(job.client, wire.frame(job.request, status, body))
        self._launching -= job.operation in _LAUNCHING
        if not self._launching:
            self._early.clear()
        if job.operation in _EXCLUSIVE:
            self._busy = False
            self._next()
        # Whatever was held back until the reply had gone out follows it.
        self._tell()
        if job.operation == wire.SPAWN and job.client is not None:
            self._deliver(job.client) if status == wire.OK else self._leave()

    def _succeeded(self, job: Job, pid: int, roles: list[bytes], fds: list[int], body: bytes) -> None:
        operation = job.operation
        if operation == wire.SPAWN:
            self._settle(*fds)
        elif operation == wire.EXITED:
            self._out_of_memory(pid)
            self.processes[job.name].exit = body
        elif operation == wire.OOM:
            self._out_of_memory(pid)
        elif operation == wire.DELETE:
            self.state = DELETED
            self._leave()
        if pid and operation in _LAUNCHING:
            process = self.processes[job.name]
            process.pid = pid
            if roles:
                self._attach(process, roles, fds)
        if operation in _AFTERWARDS:
            self.state = STOPPED if self.init.ended else _AFTERWARDS[operation]
        if pid in self._early and operation in _LAUNCHING:
            self._ended(self.processes[job.name], self._early.pop(pid))

    def _settle(self, directory: int, lock: int, listener: int, namespace: int) -> None:
        """Take over the place that the first worker prepared; `lock` is only held, as long as this process lives."""
        libc.enter_mounts(namespace)
        os.fchdir(directory)
        os.close(namespace)
        os.close(directory)
        self.watch(listener, select.POLLIN, self._accept)

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
            else:
                process.pumps.append(pump.make(self, role, fds))

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

    def _reaped(self, pid: int, status: int) -> None:
        for process in self.processes.values():
            if process.pid == pid and not process.exit:
                self._ended(process, status)
                return
        # While a runtime runs, any child may turn out to be the one that its worker will report.
        if self._launching:
            self._early[pid] = status

    def _ended(self, process: Process, status: int) -> None:
        """Have the exit written down; nobody is told before it is."""
        code = os.waitstatus_to_exitcode(status)
        code = 128 - code if code < 0 else code
        try:
            self._work(wire.EXITED, process.name, b"%d %d" % (process.pid, code), None, 0)
        except wire.Failure:
            self._pending.append(lambda: self._ended_again(process, status))
        process.pid, process.ended = 0, True
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

    def _tell_one(self, process: Process) -> None:
        process.told = True
        self._notice(wire.EXIT_NOTICE, process.name, process.exit)
        waiters, process.waiters = process.waiters, []
        for resume in waiters:
            resume()
        if self._leaving and not process.name:
            self._leave()

    def _notice(self, kind: int, name: bytes, body: bytes) -> None:
        self.sequence += 1
        frame = wire.frame(0, kind, b'{"seq":%d,%b' % (self.sequence, body[1:]))
        self._notices.append((self.sequence, name, frame))
        for client in list(self._clients.values()):
            if client.watching:
                self._send(client, frame)

    def _oom_event(self, fd: int, _: int) -> None:
        try:
            os.read(fd, 4096)
            self._work(wire.OOM, b"", b"", None, 0)
        except (OSError, wire.Failure):
            return  # the exit's worker looks at the same counter

    def _out_of_memory(self, kills: int) -> None:
        if kills > self.oom_kills:
            self.oom_kills = kills
            # Of several the last is enough, so that their number does not grow what is kept.
            self._notices = [old for old in self._notices if old[1] != b"*"]
            self._notice(wire.OOM_NOTICE, b"*", b'{"kills":%d}' % kills)

    # -- going away -----------------------------------------------------------------------------------------------

    def _delete(self, name: bytes, rest: bytes, client: Client, request: int) -> None:
        """Forget an exec that has ended, or have the container taken away; with `force` it is killed first."""
        process = self._find(name)
        if process.name and not process.pid and not process.ended:
            raise wire.Failure(wire.PRECONDITION, f"exec {name.decode()} is being started")
        if process.pid or (process.ended and not process.told):
            if process.pid and rest != b"force":
                raise wire.Failure(wire.PRECONDITION, f"process {name.decode() or 'init'} has not ended")
            if process.pid:
                libc.kill(process.pid, libc.SIGKILL)
            process.waiters.append(lambda: self._delete_told(process, client, request))
            if self.state == PAUSED:
                self._work(wire.RESUME, b"", b"", None, 0)
            return
        self._delete_told(process, client, request)

    def _delete_told(self, process: Process, client: Client, request: int) -> None:
        for each in process.pumps:
            each.release()
        if all([each.drained() for each in process.pumps]):
            self._delete_drained(process, client, request)
            return
        ticks = iter(range(_DRAIN_TICKS))

        def again() -> bool:
            if not all([each.drained() for each in process.pumps]) and next(ticks, None) is not None:
                return False
            self._delete_drained(process, client, request)
            return True

        self._busy = True
        self._pending.append(again)

    def _delete_drained(self, process: Process, client: Client, request: int) -> None:
        self._busy = False
        self._close(process)
        if process.name:
            self.processes.pop(process.name, None)
            self._notices = [old for old in self._notices if old[1] != process.name]
            records.remove(records.exit_path(process.name.decode()))
            self._send(client, wire.frame(request, wire.OK, process.exit))
            self._next()
            return
        try:
            self._work(wire.DELETE, b"", b"", client, request)
        except wire.Failure as failure:
            self._fail(client, request, failure)

    def _close(self, process: Process) -> None:
        self._close_stdin(process)
        for each in process.pumps:
            each.close()
        for fd in process.held:
            os.close(fd)
        if process.master >= 0:
            os.close(process.master)
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
            if any(client.outbox for client in self._clients.values()) and next(ticks, None) is not None:
                return False
            self._stop()
            return True

        self._pending.append(unless_said)

    def _stop(self) -> None:
        self._running = False
        try:
            os.unlink("monitor.sock")
        except FileNotFoundError:
            return


def _number(text: bytes) -> int:
    if not text.isdigit():
        raise wire.Failure(wire.INVALID, f"{text[:20]!r} is not a number")
    return int(text)


def main(fd: int, inbox: bytearray, request: int, body: bytes) -> None:
    """Be the monitor that the request on this connection asks for; returns when its work is over."""
    libc.rename_process(b"wherry-monitor")
    libc.forbid_dumps()
    libc.become_subreaper()
    monitor = Monitor()
    monitor.begin(fd, inbox, request, body)
    monitor.run()
