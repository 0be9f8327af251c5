"""A monitor's life played in the zygote before it forks: what that writes once, no child writes into its own copy.

The interpreter specializes code that has run a few times and fills caches of attributes and types, all by writing into
memory that is shared otherwise. Rehearsed, a monitor has 200 KiB less of its own.
"""

from __future__ import annotations

import os
import select

from wherry_task.monitor import libc, monitor, wire
from wherry_task.monitor.clients import Client

_TIMES = 12  # the interpreter of 3.11 specializes what has run eight times


def play() -> None:
    """Takes some 50 ms. Signals must be blocked already; the working directory is where worker's errors would go."""
    for _ in range(_TIMES):
        _once()


def _once() -> None:
    actor = monitor.Monitor()
    ours, its = libc.message_pair()
    os.set_blocking(its, False)
    place = [os.open(each, os.O_RDONLY) for each in (".", "/dev/null", "/dev/null", "/proc/self/ns/mnt")]
    actor.settle(*place)
    actor.unwatch(place[2])
    client = actor.clients[its] = Client(its, bytearray(_request(1, b"watch")))
    actor.watch(its, select.POLLIN, actor.received)
    actor.deliver(client)
    os.write(ours, b"".join(_request(*each) for each in enumerate((b"state", b"kill", b"wait", b"pause"), 2)))
    actor.init.pid, actor.state = _gone(), monitor.CREATED

    def over() -> bool:
        if not actor.init.ended or actor.busy():
            return False
        actor.stop()
        return True

    actor.pending.append(over)
    actor.run()
    for fd in (ours, its, place[1], place[2], actor.signals):
        os.close(fd)


def _request(number: int, operation: bytes) -> bytes:
    return wire.frame(b'{"id":%d,"op":"%b","exec_id":""}' % (number, operation))


def _gone() -> int:
    """A child that ends at once, as an init would."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    return pid
