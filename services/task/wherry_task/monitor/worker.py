"""A worker: forked from the monitor for one operation, reports in one message, and is gone.

It has the monitor's state as of the fork, read-only in effect; it works in the bundle and in the monitor's mount
namespace, and may block. What it opens for the monitor goes back with the report.
"""

from __future__ import annotations

import _socket
import os

from wherry_task.monitor import compact, libc, operations, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from wherry_task.monitor.monitor import Monitor

TROUBLE = "monitor.log"
_REPORT = 3
_MAX_TROUBLE = 1 << 20

# What is written as text, not JSON, behind the exec id.
_TEXT = (wire.EXITED, wire.RESIZE, wire.KILL_ALL)

_OPERATIONS: dict[int, Callable[[Monitor, str, Any], operations.Result]] = {
    wire.SPAWN: operations.spawn, wire.CREATE: operations.create, wire.START: operations.start,
    wire.EXEC: operations.execute, wire.DELETE: operations.delete, wire.STATE: operations.state,
    wire.RESIZE: operations.resize, wire.PAUSE: operations.pause, wire.RESUME: operations.resume,
    wire.UPDATE: operations.update, wire.CHECKPOINT: operations.checkpoint, wire.KILL_ALL: operations.kill_all,
    wire.EXITED: operations.exited, wire.OOM: operations.oom,
}  # fmt: skip


def main(monitor: Monitor, report: int, operation: int, name: bytes, rest: bytes) -> NoReturn:
    """Do the operation and report; never returns, whatever happens."""
    try:
        if operation == wire.RESIZE:
            result = _do(monitor, operation, name, rest)  # the one that needs a descriptor of the monitor's
            os.dup2(report, _REPORT, inheritable=False)
        else:
            os.dup2(report, _REPORT, inheritable=False)
            # Not one of the monitor's descriptors may live on in here: a held stdin would not end when it closes it.
            os.closerange(_REPORT + 1, os.sysconf("SC_OPEN_MAX"))
            result = _do(monitor, operation, name, rest)
        _send(result)
    except BaseException as error:
        note(error)
    finally:
        os._exit(0)


def _do(monitor: Monitor, operation: int, name: bytes, rest: bytes) -> operations.Result:
    try:
        perform = _OPERATIONS.get(operation)
        if perform is None:
            raise wire.Failure(wire.UNIMPLEMENTED, f"operation {operation}")
        return perform(monitor, name.decode(), _arguments(operation, rest))
    except wire.Failure as failure:
        return operations.Result(failure.message, status=failure.code)
    except OSError as error:
        translated = wire.failure_of(error, error.filename if isinstance(error.filename, str) else "monitor")
        return operations.Result(translated.message, status=translated.code)
    except Exception as error:
        note(error)
        return operations.Result(f"{type(error).__name__}, see {TROUBLE} in the bundle", status=wire.INTERNAL)


def _arguments(operation: int, rest: bytes) -> Any:
    if operation in _TEXT:
        return rest.decode()
    try:
        arguments = compact.loads(rest) if rest else {}
    except ValueError as error:
        raise wire.Failure(wire.INVALID, f"the arguments are not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise wire.Failure(wire.INVALID, "the arguments must be an object")
    return arguments


def _send(result: operations.Result) -> None:
    body = result.body.encode() if isinstance(result.body, str) else compact.dumps(result.body)
    head = "\t".join([str(result.status), str(result.pid), *(role for role, _ in result.kept)])
    message = head.encode() + b"\n" + body
    if len(message) > libc.MAX_MESSAGE:
        message = f"{wire.EXHAUSTED}\t0\nthe reply of {len(message)} bytes is too long".encode()
    fds = b"".join(fd.to_bytes(4, "little") for _, each in result.kept for fd in each)
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)] if fds else []
    _socket.socket(fileno=_REPORT).sendmsg([message], ancillary)


def note(error: BaseException) -> None:
    """Write an unexpected error's traceback into monitor.log of the working directory."""
    import traceback  # only now: it costs memory

    try:
        with open(TROUBLE, "a") as file:
            if file.tell() < _MAX_TROUBLE:
                file.writelines(traceback.format_exception(error))
    except OSError:
        return  # a disk that is full as well: there is nowhere left to say it
