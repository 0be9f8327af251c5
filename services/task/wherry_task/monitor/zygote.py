"""The zygote: a bare Python process that is started once and forks a monitor per container in under a millisecond.

    /usr/bin/python3 -I -S -E zygote.py SOCKET [OOM_SCORE_ADJ]

It daemonizes; the command ends with status 0 when the zygote accepts connections, else with a message and status 1.
A connection speaks the protocol of README.md. One on which `spawn` or `cleanup` was asked becomes, with its next
frames, the connection of the monitor or cleaner that was forked for it.

The zygote is the subreaper above its monitors: the container of a monitor that dies falls to it, and it kills it at
once - before any service has noticed, and also when none runs. Everything else that is left is for `cleanup`.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # -I and -S leave the standard library alone on the path; ours comes last and shadows nothing.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import fcntl
import gc

from wherry_task.monitor import cleanup, container, libc, monitor, wire
from wherry_task.monitor.loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Args = dict[str, Any]
    Role = tuple[Callable[[int, bytes, Args], None], int, bytes, Args]


class Zygote:
    """Serves its socket until it is told to quit. `role` is set in a forked child: what that has to become."""

    def __init__(self, name: str) -> None:
        self.role: Role | None = None
        self._name = name
        self._monitors: dict[int, str] = {}
        self._cleaners: set[int] = set()
        self._clients: list[wire.Channel] = []
        self._loop = Loop(self._ended, self._stop)
        self._listener = wire.listen(name)
        self._loop.watch(self._listener, 1, self._accept)

    def run(self) -> None:
        """Returns in the zygote when it quits, and in each child with its `role`."""
        self._loop.run()

    def _accept(self, _: int) -> None:
        try:
            fd = wire.accept(self._listener)
        except OSError:
            return
        self._clients.append(wire.Channel(self._loop, fd, self._message, self._clients.remove))

    def _message(self, client: wire.Channel, message: Args) -> None:
        name, number = message.get("op"), message.get("id")
        if name == "spawn":
            self._fork(client, message, monitor.main)
        elif name == "cleanup":
            self._fork(client, message, cleanup.main)
        elif name == "ping":
            monitors = [{"pid": pid, "bundle": bundle} for pid, bundle in self._monitors.items()]
            client.send({"id": number, "ok": {"pid": os.getpid(), "version": monitor.VERSION, "monitors": monitors}})
        elif name == "quit":
            client.send({"id": number, "ok": {}})
            self._stop()
        else:
            failure = {"code": wire.UNIMPLEMENTED, "message": f"operation {name!r}"}
            client.send({"id": number, "error": failure})

    def _fork(self, client: wire.Channel, message: Args, become: Callable[[int, bytes, Args], None]) -> None:
        if not self._loop.running:
            return  # this is a child already, or a zygote on its way out
        try:
            pid = os.fork()
        except OSError as error:
            failure = wire.failure_of(error, "fork")
            client.send({"id": message.get("id"), "error": {"code": failure.code, "message": failure.message}})
            return
        fd, inbox = client.detach()
        self._clients.remove(client)
        if pid:
            os.close(fd)
            if become is monitor.main:
                self._monitors[pid] = str(message.get("bundle"))
            else:
                self._cleaners.add(pid)
            return
        self.role = (become, fd, inbox, message)
        self._loop.running = False

    def _ended(self, pid: int, status: int) -> None:
        self._monitors.pop(pid, None)
        self._cleaners.discard(pid)
        # Whoever is our child and neither monitor nor cleaner is what a dead monitor left. Killing one may bring its
        # own children, hence this after every death.
        for orphan in _children():
            if orphan not in self._monitors and orphan not in self._cleaners:
                container.kill_quietly(orphan, libc.SIGKILL)

    def _stop(self) -> None:
        os.unlink(self._name)
        self._loop.running = False


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _become(role: Role) -> None:
    """In a child: keep nothing of the zygote's but the one connection, and do the work."""
    main, fd, inbox, message = role
    os.setsid()
    os.dup2(fd, 3, inheritable=False)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    main(3, inbox, message)


def _detach(oom_score_adj: str) -> int:
    """Fork twice into a session of our own. Returns, in the daemon, a pipe's end to report readiness on."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        trouble = os.read(reader, 4096)
        # An end without a word means that the daemon died before it was ready.
        if trouble != b"ready":
            sys.stderr.write((trouble.decode() or "the zygote died at its start") + "\n")
        os._exit(trouble != b"ready")
    os.setsid()
    if os.fork():
        os._exit(0)
    os.umask(0o077)
    null = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    low, high = min(writer, 1 << 20), os.sysconf("SC_OPEN_MAX")
    os.closerange(3, low)
    os.closerange(low + 1, high)
    if oom_score_adj:
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(oom_score_adj)
        except (OSError, ValueError):
            pass  # lowering it takes CAP_SYS_RESOURCE, and serving without is better than not serving  # noqa: S110
    return writer


def _settle(path: str) -> Zygote:
    """Take the directory of the socket. Raises OSError, or Failure when another zygote serves there."""
    folder, name = os.path.split(os.path.abspath(path))
    os.chdir(folder)
    status = os.stat(".")
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise wire.Failure(wire.DENIED, f"{folder} is not a directory of mode 0700 of our own")
    lock = os.open(f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise wire.Failure(wire.EXISTS, f"another zygote serves {path}") from None
    if os.path.lexists(name):
        os.unlink(name)
    return Zygote(name)


def main(path: str, oom_score_adj: str = "") -> None:
    """Daemonize and serve; every forked child ends in here too."""
    writer = _detach(oom_score_adj)
    try:
        libc.rename_process("wherry-zygote")
        libc.become_subreaper()
        zygote = _settle(path)
    except (OSError, wire.Failure) as error:
        os.write(writer, str(error).encode()[:4000])
        os._exit(1)
    os.write(writer, b"ready")
    os.close(writer)
    # What lives now lives for ever; frozen, no collection in a child will touch and so copy its pages.
    gc.collect()
    gc.freeze()
    status = 0
    try:
        zygote.run()
        if zygote.role:
            _become(zygote.role)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException as error:
        status = 70
        monitor.note(error)
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:3])
