"""The zygote: a bare Python process that is started once and forks a monitor per container in under a millisecond.

    /usr/bin/python3 -I -S -E zygote.py SOCKET [OOM_SCORE_ADJ]

It daemonizes; the command ends with status 0 when the zygote accepts connections, else with a message and status 1.

It forks for every connection before it reads a byte: the child reads the first request of README.md's protocol and
becomes the monitor, the cleaner, or whatever else that asks for. A page that the zygote writes between two forks is
one that the earlier child no longer shares with anyone, so the less the zygote does itself, the smaller each monitor.

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
import select

from wherry_task.monitor import beginning, libc, rehearsal, sealed, wire, worker
from wherry_task.monitor.beginning import LISTENER, LOCK, SIGNALS

_MAX_FDS = os.sysconf("SC_OPEN_MAX")
_READY = 20  # above all that a rehearsal opens


def _serve() -> bool:
    """Fork for each connection and bury the dead. Returns True in a child, False in a zygote told to quit."""
    children: set[int] = set()
    poller = select.poll()
    poller.register(LISTENER, select.POLLIN)
    poller.register(SIGNALS, select.POLLIN)
    while True:
        for ready, _ in poller.poll():
            if ready == SIGNALS:
                if os.read(SIGNALS, 128)[0] == libc.SIGTERM:
                    return False
                _bury(children)
                continue
            try:
                fd = libc.accept(LISTENER)
                pid = libc.fork()
            except OSError:
                continue  # a stranger, or no process to be had: the connection ends, and its client sees that
            if not pid:
                return True
            children.add(pid)
            os.close(fd)


def _bury(children: set[int]) -> None:
    """Reap; where a monitor died, kill what it left: whoever is our child and was not forked by us."""
    look = False
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            # An orphan's death brings its own children to us, so it counts as well.
            look |= bool(status) or pid not in children
            children.discard(pid)
    except ChildProcessError:
        return
    if look:
        for orphan in beginning.children_of(os.getpid()):
            if orphan not in children:
                libc.kill(orphan, libc.SIGKILL)


def _detach(oom_score_adj: str) -> None:
    """Fork twice into a session of our own. Returns in the daemon; what it writes to _READY is how its start went."""
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
    os.dup2(writer, _READY, inheritable=False)
    os.closerange(3, _READY)
    os.closerange(_READY + 1, _MAX_FDS)
    if oom_score_adj:
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(oom_score_adj)
        except (OSError, ValueError):
            pass  # lowering it takes CAP_SYS_RESOURCE, and serving without is better than not serving


def _put(fd: int, number: int) -> None:
    if fd != number:
        os.dup2(fd, number, inheritable=False)
        os.close(fd)


def _enter(folder: str) -> None:
    """Work in the socket's directory. Raises OSError and Failure."""
    os.chdir(folder)
    status = os.stat(".")
    # Only through it may others pass (0711), on the way to a container that has ids of its own.
    if status.st_uid != os.geteuid() or status.st_mode & 0o066:
        raise wire.Failure(wire.DENIED, f"{folder} is not a directory of mode 0700 of our own")


def _settle(name: str) -> None:
    """Listen in the working directory. Raises OSError, or Failure when another zygote serves there."""
    _put(os.open(f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), LOCK)
    try:
        fcntl.flock(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise wire.Failure(wire.EXISTS, f"another zygote serves {name}") from None
    if os.path.lexists(name):
        os.unlink(name)
    _put(wire.listen(name), LISTENER)


def main(path: str, oom_score_adj: str = "") -> None:
    """Daemonize and serve; every forked child ends in here too."""
    folder, name = os.path.split(os.path.abspath(path))
    _detach(oom_score_adj)
    try:
        _enter(folder)
        libc.forbid_dumps()
        libc.become_subreaper()
        _put(libc.signal_descriptor(), SIGNALS)
        sealed.make()
        rehearsal.play()
        libc.rename_process(b"wherry-zygote")
        _settle(name)
    except (OSError, wire.Failure) as error:
        os.write(_READY, str(error).encode()[:4000])
        os._exit(1)
    zygote = os.getpid()
    os.write(_READY, b"ready")
    os.close(_READY)
    # What lives now lives for ever; frozen, no collection in a child will touch and so copy its pages.
    gc.collect()
    gc.freeze()
    status = 0
    try:
        if _serve():
            status = beginning.main(zygote)
        else:
            os.unlink(name)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException as error:
        status = 70
        worker.note(error)
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:3])
