"""How a monitor begins: it has a worker read and do the first request, and holds still until something happens to it.

Memory that a forked process writes to is its own from then on, and running Python writes everywhere: it counts
references. So a new monitor runs next to nothing: it forks, takes the report into a buffer and waits in poll(2), for a
word of a client, a signal, a process that ended. Only then does it become a Monitor, out of what lies in the buffer.
"""

from __future__ import annotations

import os

from wherry_task.monitor import cleanup, compact, libc, monitor, operations, warming, wire, worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    Args = dict[str, Any]

# Where descriptors lie, in the zygote and its children. A system call gives out the lowest free number, so that those
# of a report follow upon its socket: directory, lock, listener, mount namespace and, if it is there, the OOM event.
CONNECTION, SIGNALS, LOCK, LISTENER = 3, 4, 5, 6
_MINE, _ITS = 5, 6  # the pair's ends, once the zygote's own two are closed
_WAITED_FOR = (CONNECTION, SIGNALS, _ITS + 2, _ITS + 4)
_LISTENED = libc.awaited(_WAITED_FOR)

# A report's first byte.
_OTHER, _SPAWNED, _LAUNCHED, _QUIET, _QUIET_OOM = b"0", b"1", b"2", b"3", b"4"
_HELD = ("place", "hold", "stdin", "shared", "oom")  # roles of what needs no attention, but for the last

_NOBODY = (0, 0)


def main(zygote: int) -> int:
    """In a child of the zygote, with its descriptors and one connection: be a monitor, or have the request answered.

    Returns the process's exit status.
    """
    os.setsid()

    def first() -> NoReturn:
        _first(zygote)

    size, early = hold(first)
    kind = libc.first_byte(size)
    if kind <= _OTHER:
        return kind != _OTHER  # without a word of the worker's, the zygote looks for what that has left
    actor = monitor.Monitor(SIGNALS)
    os.close(_MINE)
    actor.begin(CONNECTION, kind != _SPAWNED, *libc.received(size))
    if early != _NOBODY:
        actor.found(*early)
    actor.run()
    return 0


def hold(first: Callable[[], NoReturn]) -> tuple[int, tuple[int, int]]:
    """Have a worker do the first request, then wait for something to do.

    Returns the length of the worker's report, and a child that ended meanwhile, with its status.

    This is what every monitor runs, and all that most do until the end of their container is near.
    """
    libc.become_subreaper()
    os.closerange(LOCK, LISTENER + 1)
    libc.message_pair()
    pid = libc.fork()
    if not pid:
        first()
    os.close(_ITS)
    size = libc.take(_MINE)
    os.waitpid(pid, 0)
    kind = libc.first_byte(size)
    if kind > _OTHER:
        libc.rename_process(b"wherry-monitor")
    if kind >= _QUIET:
        # One pending signal may stand for two ends: the worker's and, already, the container's.
        if os.read(SIGNALS, 128)[0] != libc.SIGCHLD:
            os.kill(os.getpid(), libc.SIGTERM)
        ended = os.waitpid(-1, os.WNOHANG)
        if ended != _NOBODY:
            return size, ended
        libc.wait(_LISTENED, 4 if kind == _QUIET_OOM else 3)
    return size, _NOBODY


# -- the first worker ---------------------------------------------------------------------------------------------


def _first(zygote: int) -> NoReturn:
    """Read one request and do it."""
    try:
        os.closerange(SIGNALS, _ITS)
        os.set_blocking(CONNECTION, True)
        warming.warm()
        args = _read_request()
        if args is None:
            worker.send(operations.Result(b""), _ITS, "0")
        elif args.get("op") in ("spawn", "launch"):
            _prepare(args)
        else:
            _answer(args, zygote)
            worker.send(operations.Result(b""), _ITS, "0")
    except BaseException as error:
        worker.note(error)
    finally:
        os._exit(0)


def _read_request() -> Args | None:
    """Exactly one frame: what follows is for the monitor. None where the client has gone or sends no frame."""
    inbox = bytearray()
    try:
        while (args := wire.take(inbox)) is None:
            missing = 4 - len(inbox) if len(inbox) < 4 else 4 + int.from_bytes(inbox[:4], "big") - len(inbox)
            data = os.read(CONNECTION, missing)
            if not data:
                return None
            inbox += data
    except (ValueError, OSError):
        return None
    return args


def _prepare(args: Args) -> None:
    """Make the monitor's place, and for a launch the container too; the client has its answer before we end."""
    operation = str(args["op"])
    result = worker.do(monitor.Monitor(-1), operation, "", args)
    say = wire.reply if result.done else wire.refusal
    kind = _kind(operation, result) if result.done else "0"
    # The event goes next to the place: the monitor waits for it without looking at what it was given.
    result.kept = sorted(result.kept, key=lambda each: (each[0] != "place", each[0] != "oom"))
    body, result.body = result.body, b""
    worker.send(result, _ITS, kind)
    try:
        os.write(CONNECTION, say(args.get("id"), body))
    except OSError:
        return  # it has gone: that is for the monitor to notice
    finally:
        os.set_blocking(CONNECTION, False)


def _kind(operation: str, result: operations.Result) -> str:
    if operation == "spawn":
        return _SPAWNED.decode()
    roles = [role for role, _ in result.kept]
    if not result.pid or not all(role in _HELD or role.startswith(("counter:", "logger:")) for role in roles):
        return _LAUNCHED.decode()
    return (_QUIET_OOM if "oom" in roles else _QUIET).decode()


def _answer(args: Args, zygote: int) -> None:
    """What is asked of the zygote itself."""
    request, operation = args.get("id"), args.get("op")
    if operation == "cleanup":
        cleanup.main(CONNECTION, args)
    elif operation == "ping":
        children = [pid for pid in children_of(zygote) if pid != os.getppid()]
        about = {"pid": zygote, "version": monitor.VERSION, "children": children}
        os.write(CONNECTION, wire.reply(request, compact.dumps(about)))
    elif operation == "quit":
        os.kill(zygote, libc.SIGTERM)
        os.write(CONNECTION, wire.reply(request, b""))
    else:
        failure = wire.Failure(wire.UNIMPLEMENTED, f"operation {operation!r}")
        os.write(CONNECTION, wire.refusal(request, failure.body()))


def children_of(pid: int) -> list[int]:
    """Of a process with one thread; [] when it is gone."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []
