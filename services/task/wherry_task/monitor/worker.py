"""A worker: forked from the monitor for one operation, reports in one message, and is gone.

It has the monitor's state as of the fork, read-only in effect; it works in the bundle and in the monitor's mount
namespace, and may block. What it opens for the monitor goes back with the report.
"""

from __future__ import annotations

import _socket
import os

from wherry_task.monitor import libc, operations, sealed, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from wherry_task.monitor.monitor import Monitor

TROUBLE = "monitor.log"
_REPORT = 3
_MAX_FDS = os.sysconf("SC_OPEN_MAX")
_MAX_TROUBLE = 1 << 20

_OPERATIONS: dict[str, Callable[[Monitor, str, Any], operations.Result]] = {
    "spawn": operations.spawn, "launch": operations.launch, "create": operations.create, "start": operations.start,
    "exec": operations.execute,
    "delete": operations.delete, "state": operations.state, "resize": operations.resize, "pause": operations.pause,
    "resume": operations.resume, "update": operations.update, "checkpoint": operations.checkpoint,
    "kill_all": operations.kill_all, "exited": operations.exited,
}  # fmt: skip


def main(monitor: Monitor, report: int, operation: str, name: str, args: dict[str, Any]) -> NoReturn:
    """Do the operation and report; never returns, whatever happens."""
    try:
        if operation == "resize":
            result = do(monitor, operation, name, args)  # the one that needs a descriptor of the monitor's
            os.dup2(report, _REPORT, inheritable=False)
        else:
            os.dup2(report, _REPORT, inheritable=False)
            # Not one of the monitor's descriptors may live on in here: a held stdin would not end when it closes it.
            os.closerange(_REPORT + 1, sealed.FIRST)
            os.closerange(sealed.LAST + 1, _MAX_FDS)
            result = do(monitor, operation, name, args)
        send(result)
    except BaseException as error:
        note(error)
    finally:
        os._exit(0)


def do(monitor: Monitor, operation: str, name: str, args: dict[str, Any]) -> operations.Result:
    """The result of an operation, whatever happens in it."""
    try:
        return _OPERATIONS[operation](monitor, name, args)
    except wire.Failure as failure:
        return operations.refused(failure)
    except OSError as error:
        what = error.filename if isinstance(error.filename, str) else "monitor"
        return operations.refused(wire.failure_of(error, what))
    except Exception as error:
        note(error)
        message = f"{type(error).__name__}, see {TROUBLE} in the bundle"
        return operations.refused(wire.Failure(wire.INTERNAL, message))


def send(result: operations.Result, report: int = _REPORT, first: str = "1") -> None:
    """The one message, or nothing if nobody is left to take it; `first` is the first word of one that is done."""
    head = "\t".join([first if result.done else "0", str(result.pid), *(role for role, _ in result.kept)])
    message = head.encode() + b"\n" + result.body
    if len(message) > libc.MAX_MESSAGE:
        failure = wire.Failure(wire.EXHAUSTED, f"the reply of {len(message)} bytes is too long")
        message = b"0\t0\n" + failure.body()
    fds = b"".join(fd.to_bytes(4, "little") for _, each in result.kept for fd in each)
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)] if fds else []
    try:
        _socket.socket(fileno=report).sendmsg([message], ancillary)
    except BrokenPipeError:
        return  # the monitor has gone: nobody wants to know


def note(error: BaseException) -> None:
    """Write an unexpected error's traceback into monitor.log of the working directory."""
    import traceback  # only now: it costs memory

    try:
        with open(TROUBLE, "a") as file:
            if file.tell() < _MAX_TROUBLE:
                file.writelines(traceback.format_exception(error))
    except OSError:
        return  # a disk that is full as well: there is nowhere left to say it
