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

from wherry_task.monitor import cleanup, compact, libc, monitor, rehearsal, wire, worker

_MAX_FDS = os.sysconf("SC_OPEN_MAX")


def _serve(listener: int, signals: int) -> int:
    """Fork for each connection and bury the dead. Returns the connection in a child, -1 in a zygote told to quit."""
    children: set[int] = set()
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    poller.register(signals, select.POLLIN)
    while True:
        for ready, _ in poller.poll():
            if ready == signals:
                if os.read(signals, 128)[0] == libc.SIGTERM:
                    return -1
                _bury(children)
                continue
            try:
                fd = libc.accept(listener)
                pid = os.fork()
            except OSError:
                continue  # a stranger, or no process to be had: the connection ends, and its client sees that
            if not pid:
                return fd
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
        for orphan in _children(os.getpid()):
            if orphan not in children:
                libc.kill(orphan, libc.SIGKILL)


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _become(fd: int) -> None:
    """In a child: keep nothing of the zygote's but the one connection, read what is wanted of us and do it."""
    os.setsid()
    os.dup2(fd, 3, inheritable=False)
    os.closerange(4, _MAX_FDS)
    os.set_blocking(3, True)
    inbox = bytearray()
    args = None
    while args is None:
        data = os.read(3, 1 << 16)
        if not data:
            return
        inbox += data
        args = wire.take(inbox)
    operation = args.get("op")
    if operation in ("spawn", "launch"):
        os.set_blocking(3, False)
        monitor.main(3, inbox, args)
    elif operation == "cleanup":
        cleanup.main(3, args)
    else:
        os.write(3, _answer(args.get("id"), operation))


def _answer(request: object, operation: object) -> bytes:
    zygote = os.getppid()
    if operation == "ping":
        children = [pid for pid in _children(zygote) if pid != os.getpid()]
        return wire.reply(request, compact.dumps({"pid": zygote, "version": monitor.VERSION, "children": children}))
    if operation == "quit":
        os.kill(zygote, libc.SIGTERM)
        return wire.reply(request, b"")
    return wire.refusal(request, wire.Failure(wire.UNIMPLEMENTED, f"operation {operation!r}").body())


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
    low, high = writer, _MAX_FDS
    os.closerange(3, low)
    os.closerange(low + 1, high)
    if oom_score_adj:
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(oom_score_adj)
        except (OSError, ValueError):
            pass  # lowering it takes CAP_SYS_RESOURCE, and serving without is better than not serving
    return writer


def _settle(path: str) -> int:
    """Listen in the socket's directory. Raises OSError, or Failure when another zygote serves there."""
    folder, name = os.path.split(os.path.abspath(path))
    os.chdir(folder)
    status = os.stat(".")
    # Only through it may others pass (0711), on the way to a container that has ids of its own.
    if status.st_uid != os.geteuid() or status.st_mode & 0o066:
        raise wire.Failure(wire.DENIED, f"{folder} is not a directory of mode 0700 of our own")
    lock = os.open(f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise wire.Failure(wire.EXISTS, f"another zygote serves {path}") from None
    if os.path.lexists(name):
        os.unlink(name)
    return wire.listen(name)


def main(path: str, oom_score_adj: str = "") -> None:
    """Daemonize and serve; every forked child ends in here too."""
    writer = _detach(oom_score_adj)
    try:
        libc.rename_process(b"wherry-zygote")
        libc.become_subreaper()
        listener = _settle(path)
        signals = libc.signal_descriptor()
    except (OSError, wire.Failure) as error:
        os.write(writer, str(error).encode()[:4000])
        os._exit(1)
    rehearsal.play()
    os.write(writer, b"ready")
    os.close(writer)
    # What lives now lives for ever; frozen, no collection in a child will touch and so copy its pages.
    gc.collect()
    gc.freeze()
    status = 0
    try:
        fd = _serve(listener, signals)
        if fd < 0:
            os.unlink(os.path.basename(path))
        else:
            _become(fd)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException as error:
        status = 70
        worker.note(error)
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:3])
