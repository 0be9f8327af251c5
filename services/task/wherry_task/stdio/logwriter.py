"""Writes the log of a container that a shim v2 stands by: a logger of its own, started by that shim as `binary://`.

    python3 logwriter.py MAX_SIZE:MAX_FILES:PATH

The monitor's own pumps in a process of their own, with nothing of the service loaded.
"""

from __future__ import annotations

import os
import sys
from urllib.parse import quote

if __name__ == "__main__":
    # Its own directory is no place for modules of other names; ours come last and shadow nothing.
    sys.path[0:1] = []
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from wherry_task.monitor import pump
from wherry_task.monitor.poller import Poller

OUT, ERR, READY = 3, 4, 5
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK


def uri(path: str, size: int, files: int) -> str:
    """What has a shim start it. One argument alone: shims shuffle them."""
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    argument = quote(f"{size}:{files}:{path}", safe="")
    return f"binary://{interpreter}?{quote(os.path.abspath(__file__), safe='')}={argument}"


class Writer(Poller):
    """Runs until both streams have ended."""

    __slots__ = ("logs",)

    def __init__(self) -> None:
        super().__init__()
        self.logs: dict[str, pump.LogFile] = {}

    def unwatch(self, fd: int) -> None:
        super().unwatch(fd)
        if not self._handlers:
            self.stop()


def main(argument: str) -> None:
    """Log what comes from the descriptors 3 and 4."""
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # told at the container's end; what is in the pipes comes first
    size, files, path = argument.split(":", 2)
    writer = Writer()
    for stream, source in (("stdout", OUT), ("stderr", ERR)):
        pump.make(writer, f"log:{stream}:{size}:{files}:{path}".encode(), [source, os.open(path, _FLAGS, 0o600)])
    os.close(READY)
    writer.run()


if __name__ == "__main__":
    main(sys.argv[1])
