"""One monitor: the clients of one container, told what they ask and what happens. README.md has the protocol."""

from __future__ import annotations

import fcntl
import os
import stat

from wherry_task.monitor import container, libc, mounts, records, wire
from wherry_task.monitor.loop import Loop
from wherry_task.monitor.process import text, words
from wherry_task.monitor.runtime import Runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Args = dict[str, Any]

VERSION = 1
SOCKET, LOCK, TROUBLE = "monitor.sock", "monitor.lock", "monitor.log"
_LAST_WORDS_SECONDS = 2.0


def about(args: Args) -> Args:
    """What a spawn or a cleanup says of a container, checked. Raises Failure."""
    found: Args = {key: text(args, key) for key in ("bundle", "container", "runtime", "root")}
    for key, value in found.items():
        if not value or (key in ("bundle", "root") and os.path.normpath(value) != value) or len(value) > 4096:
            raise wire.Failure(wire.INVALID, f"{key} {value!r} is not usable")
    if not found["bundle"].startswith("/") or not found["root"].startswith("/") or found["container"][0] in "-.":
        raise wire.Failure(wire.INVALID, "bundle and root must be absolute, container an identifier")
    if "/" in found["container"]:
        raise wire.Failure(wire.INVALID, f"container {found['container']!r} is not an identifier")
    return {**found, "options": words(args, "options"), "cgroups": {}}


def enter_bundle(path: str) -> None:
    """Make the bundle the working directory. Raises Failure unless it is ours alone to write."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise wire.failure_of(error, f"bundle {path}") from None
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        os.close(fd)
        raise wire.Failure(wire.DENIED, f"bundle {path} can be written by others")
    os.fchdir(fd)
    os.close(fd)


def lock_bundle() -> int:
    """Hold the working directory's bundle as its one monitor or cleaner, until this process ends. Raises Failure."""
    fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise wire.Failure(wire.EXISTS, "the bundle has a living monitor or is being cleaned") from None
    return fd


class Monitor:
    """Serves until its container is deleted, or until nobody is left who could ask it to make one."""

    def __init__(self, args: Args) -> None:
        """Settle in the bundle. Raises Failure."""
        self._about = about(args)
        enter_bundle(self._about["bundle"])
        try:
            self._lock = lock_bundle()
            mounts.enter_namespace(os.getcwd())
            os.makedirs(records.EXITS, 0o700, exist_ok=True)
            libc.become_subreaper()
            records.write(records.ABOUT, self._about, durable=False)
            records.remove(SOCKET)
            self._listener = wire.listen(SOCKET)
        except OSError as error:
            raise wire.failure_of(error, "monitor") from None
        self.loop = Loop(self._orphan, self._terminate)
        runtime = Runtime(self.loop, self._about["runtime"], self._about["root"], self._about["container"],
                          self._about["options"])  # fmt: skip
        self._container = container.Container(self.loop, runtime, self._about, self._notify)
        self._clients: list[wire.Channel] = []
        self._notices: list[Args] = []
        self._sequence = 0
        self._leaving = False
        self.loop.watch(self._listener, 1, self._accept)
        self._operations: dict[str, Callable[[Args], Any]] = {
            "create": self._container.create, "start": self._container.start, "exec": self._container.exec,
            "kill": self._container.kill, "pause": self._container.pause, "resume": self._container.resume,
            "update": self._container.update, "checkpoint": self._container.checkpoint,
            "resize": self._container.resize, "close_stdin": self._container.close_stdin,
            "wait": self._container.wait, "state": self._state, "delete": self._delete, "shutdown": self._shutdown,
        }  # fmt: skip

    def adopt(self, fd: int, inbox: bytes | bytearray) -> wire.Channel:
        """Serve one more connection; `inbox` was read from it already."""
        client = wire.Channel(self.loop, fd, self._message, self._gone, inbox)
        self._clients.append(client)
        return client

    def _accept(self, _: int) -> None:
        try:
            self.adopt(wire.accept(self._listener), b"")
        except OSError:
            return

    def _gone(self, client: wire.Channel) -> None:
        if client in self._clients:
            self._clients.remove(client)
        # A monitor without a container that nobody holds would stay for ever.
        if not self._clients and self._container.state == container.EMPTY:
            self.loop.running = False

    def _message(self, client: wire.Channel, message: Args) -> None:
        number, name = message.get("id"), message.get("op")
        if name == "watch":
            self._watch(client, message)
            return

        def done(value: Any, error: BaseException | None) -> None:
            client.send(self._reply(number, value, error))

        operation = self._operations.get(name) if isinstance(name, str) else None
        if operation is None:
            done(None, wire.Failure(wire.UNIMPLEMENTED, f"operation {name!r}"))
            return
        try:
            result = operation(message)
        except Exception as error:
            done(None, error)
            return
        if isinstance(result, dict):
            done(result, None)
        else:
            self.loop.start(result, done)

    def _reply(self, number: Any, value: Any, error: BaseException | None) -> Args:
        if error is None:
            return {"id": number, "ok": value}
        if isinstance(error, OSError):
            error = wire.failure_of(error, error.filename or "system call")
        if not isinstance(error, wire.Failure):
            note(error)
            error = wire.Failure(wire.INTERNAL, f"monitor: {type(error).__name__}, see {TROUBLE} in the bundle")
        return {"id": number, "error": {"code": error.code, "message": error.message}}

    def _watch(self, client: wire.Channel, message: Args) -> None:
        after = message.get("after") or 0
        client.send({"id": message.get("id"), "ok": {"seq": self._sequence}})
        for notice in [notice for notice in self._notices if notice["seq"] > after]:
            client.send(notice)
        client.watching = True

    def _notify(self, notice: Args) -> None:
        self._sequence += 1
        notice["seq"] = self._sequence
        # Of out-of-memory kills the last is enough; of exits each is kept until its process is deleted.
        self._notices = [old for old in self._notices if old["notice"] != "oom" or notice["notice"] != "oom"]
        self._notices.append(notice)
        for client in list(self._clients):
            if client.watching:
                client.send(notice)
        if self._leaving and notice["notice"] == "exit" and not notice["id"]:
            self._leave()

    def _state(self, args: Args) -> Args:
        return {**self._container.describe(args), "seq": self._sequence, "version": VERSION}

    def _delete(self, args: Args) -> Any:
        result = yield from self._container.delete(args)
        exec_id = text(args, "exec_id")
        if exec_id:
            self._notices = [old for old in self._notices if old["id"] != exec_id]
        else:
            self._leave()
        return result

    def _shutdown(self, args: Args) -> Args:
        if self._container.state not in (container.EMPTY, container.DELETED):
            raise wire.Failure(wire.PRECONDITION, f"the container is {self._container.state}")
        self._leave()
        return {}

    def _leave(self) -> None:
        """End once every client has what was sent to it, and soon even if one does not take it."""
        self.loop.after(0, self._leave_when_said)
        self.loop.after(_LAST_WORDS_SECONDS, self._stop)

    def _leave_when_said(self) -> None:
        if any(client.unsent for client in self._clients):
            self.loop.after(0.02, self._leave_when_said)
        else:
            self._stop()

    def _stop(self) -> None:
        records.remove(SOCKET)
        self.loop.running = False

    def _terminate(self) -> None:
        # The machine goes down, and the container got the same signal: stay to write down how it ends.
        self._leaving = True
        if self._container.state in (container.EMPTY, container.STOPPED, container.DELETED):
            self._leave()

    def _orphan(self, pid: int, status: int) -> None:
        self._container.child_exited(pid, status)


def note(error: BaseException) -> None:
    """Write an unexpected error's traceback into monitor.log of the bundle."""
    import traceback  # only now: it costs private memory

    with open(TROUBLE, "a") as file:
        file.writelines(traceback.format_exception(error))


def main(fd: int, inbox: bytes | bytearray, request: Args) -> None:
    """Be the monitor that the request on this connection asks for; returns when its work is over."""
    libc.rename_process("wherry-monitor")
    libc.forbid_dumps()
    try:
        monitor = Monitor(request)
    except wire.Failure as error:
        failure = {"code": error.code, "message": error.message}
        os.write(fd, wire.encode({"id": request.get("id"), "error": failure}))
        raise SystemExit(1) from None
    client = monitor.adopt(fd, inbox)
    client.send({"id": request.get("id"), "ok": {"pid": os.getpid(), "version": VERSION}})
    monitor.loop.run()
