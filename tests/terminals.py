"""A command on a terminal of its own, for tests that type and look."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping
from pathlib import Path

SECONDS = 30.0


class Terminal:
    """`with Terminal([...], env) as t: t.type(b"ls\\n"); t.until(b"bin")`."""

    def __init__(self, command: list[str], environment: Mapping[str, str], *, size: tuple[int, int] = (80, 24)) -> None:
        self.seen = b""
        self._master, self._slave = pty.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            command, env=dict(environment), stdin=self._slave, stdout=self._slave, stderr=self._slave,
            start_new_session=True, preexec_fn=self._control,
        )  # fmt: skip

    @staticmethod
    def _control() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    def until(self, text: bytes, seconds: float = SECONDS) -> bytes:
        """What came until the text did, and it; what comes later is for the next."""
        give_up = time.monotonic() + seconds
        while text not in self.seen:
            if select.select([self._master], [], [], max(0.0, give_up - time.monotonic()))[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self._master, 65536)
            elif time.monotonic() > give_up:
                raise AssertionError(f"{text!r} does not come, but {self.seen[-2000:]!r}")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self._slave)[3] & termios.ICANON

    @property
    def is_as_before(self) -> bool:
        return termios.tcgetattr(self._slave) == self.before

    def wait(self, seconds: float = SECONDS) -> int:
        give_up = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < give_up:
            if select.select([self._master], [], [], 0.02)[0]:
                self.seen += os.read(self._master, 65536)
        return self.process.wait(0.1)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(Path(f"/proc/{pid}/fd")))
