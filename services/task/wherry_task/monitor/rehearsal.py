"""A monitor's life played in the zygote before it forks: what that writes once, no child writes into its own copy.

The interpreter specializes code that has run a few times and fills caches of attributes and types, all by writing into
memory that is shared otherwise. Rehearsed, a monitor has 200 KiB less of its own.
"""

from __future__ import annotations

import os
import select

from wherry_task.monitor import beginning, libc, monitor, operations, warming, wire, worker
from wherry_task.monitor.beginning import CONNECTION, SIGNALS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_TIMES = 12  # the interpreter of 3.11 specializes what has run eight times
_ITS, _OURS = 6, 19  # the report's socket in its worker, and the client's end of the connection


def play() -> None:
    """Takes some 80 ms. SIGNALS is there, the numbers beside it are free; worker's errors go to the directory."""
    for _ in range(_TIMES):
        warming.warm()
        _once()


def _once() -> None:
    _, ours = libc.message_pair()  # the first is CONNECTION, for it is the lowest number
    os.dup2(ours, _OURS, inheritable=False)
    os.close(ours)
    os.set_blocking(CONNECTION, False)
    requests = [(b"watch", 0), (b"state", 0), (b"wait", 0), (b"pause", 0), (b"kill", libc.SIGKILL)]
    os.write(_OURS, b"".join(_request(number, *each) for number, each in enumerate(requests, 1)))
    init = _init()
    size, _ = beginning.hold(lambda: _report(init))
    actor = monitor.Monitor(SIGNALS)
    actor.begin(CONNECTION, True, *libc.received(size))

    def over() -> bool:
        if not actor.init.ended or actor.busy():
            return False
        actor.stop()
        return True

    actor.pending.append(over)
    actor.run()
    os.close(CONNECTION)
    os.closerange(SIGNALS + 1, _OURS + 1)


def _request(number: int, operation: bytes, signal: int) -> bytes:
    return wire.frame(b'{"id":%d,"op":"%b","exec_id":"","signal":%d}' % (number, operation, signal))


def _init() -> int:
    """A child that waits to be killed."""
    pid = os.fork()
    if not pid:
        select.poll().poll()
    return pid


def _report(init: int) -> NoReturn:
    """What the first worker of a container with two FIFOs, stdin and a memory cgroup says."""
    place = [os.open(".", os.O_RDONLY), os.eventfd(0), os.eventfd(0), os.open("/proc/self/ns/mnt", os.O_RDONLY)]
    kept = [("place", place), ("oom", [os.eventfd(0)])]
    kept += [(role, [os.open("/dev/null", os.O_RDONLY)]) for role in ("stdin", "hold", "hold")]
    worker.send(operations.Result(b"", init, [*kept, ("counter:none", [])]), _ITS, "4")
    os._exit(0)
