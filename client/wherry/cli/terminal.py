"""The caller's terminal, raw while a process with a terminal runs in the foreground, its size passed on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wherry import Process


@contextlib.contextmanager
def raw_terminal(process: Process) -> Iterator[None]:
    """Keystrokes go to the process as they are; the terminal is as before at the end."""
    if not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    loop = asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()

    def resized() -> None:
        task = loop.create_task(_resize(process))
        running.add(task)
        task.add_done_callback(running.discard)

    tty.setraw(fd)
    loop.add_signal_handler(signal.SIGWINCH, resized)
    loop.call_later(0.05, resized)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


async def _resize(process: Process) -> None:
    from wherry_shared.errors import WherryError

    columns, lines = os.get_terminal_size(sys.stdin.fileno())
    with contextlib.suppress(WherryError, OSError):
        await process.resize(columns, lines)
