"""The first migration of a process between cgroups after a rest waits for an RCU grace period, ten milliseconds and
more; those soon after it do not. So one is made ahead, from our cgroup to our cgroup, and hastened (decision 0028)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from wherry_shared.boot import boot_id

from wherry_task.monitor import cgroups

EXPEDITED, NORMAL = Path("/sys/kernel/rcu_expedited"), Path("/sys/kernel/rcu_normal")
# For how long a migration is expected after it was announced, and how often one of ours keeps the lock awake.
SECONDS, PAUSE = 0.05, 0.008


class Hastening:
    """The kernel's switch for expedited grace periods, put on for the moment of one migration.

    `record` holds the boot's id while it is on: whoever was killed meanwhile is put right by the next of its kind.
    Where the switch is not ours to use, or the host's own is on or forbids it, `hastened` changes nothing.
    """

    def __init__(self, record: Path, switch: Path = EXPEDITED, normal: Path = NORMAL) -> None:
        self._record = record
        self._switch = self._kept = -1
        with contextlib.suppress(OSError):
            self._boot = boot_id().encode()
            if normal.read_bytes().strip() == b"0":
                self._switch = os.open(switch, os.O_RDWR | os.O_CLOEXEC)
                self._kept = os.open(record, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                if os.pread(self._kept, 64, 0) == self._boot:
                    os.pwrite(self._switch, b"0", 0)
                os.ftruncate(self._kept, 0)

    @contextlib.contextmanager
    def hastened(self) -> Iterator[None]:
        """What waits for a grace period in here waits for one of 0.1 ms."""
        if not self._put_on():
            yield
            return
        try:
            yield
        finally:
            os.pwrite(self._switch, b"0", 0)
            with contextlib.suppress(OSError):
                os.ftruncate(self._kept, 0)

    def _put_on(self) -> bool:
        if self._kept < 0:
            return False
        with contextlib.suppress(OSError):
            if os.pread(self._switch, 8, 0).strip() == b"0":
                os.pwrite(self._kept, self._boot, 0)
                return os.pwrite(self._switch, b"1", 0) == 1
        return False

    def close(self) -> None:
        """Leave nothing behind."""
        for fd in (self._switch, self._kept):
            if fd >= 0:
                os.close(fd)
        self._switch = self._kept = -1
        self._record.unlink(missing_ok=True)


class Quickening:
    """Keeps the lock awake while migrations are to come."""

    def __init__(self, hastening: Hastening) -> None:
        self._hastening = hastening
        self._until = 0.0
        self._running: asyncio.Task[None] | None = None

    def expect(self) -> None:
        """One is to come soon."""
        self._until = time.monotonic() + SECONDS
        if self._running is None or self._running.done():
            # Not before the caller waits for something: the thread's first steps are Python, too.
            self._running = asyncio.get_running_loop().create_task(self._begin())

    async def _begin(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._run)

    def _run(self) -> None:
        try:
            fd = os.open(cgroups.mine(), os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            with self._hastening.hastened():
                os.write(fd, b"0")
            while time.monotonic() < self._until:
                time.sleep(PAUSE)
                os.write(fd, b"0")
        except OSError:
            return
        finally:
            os.close(fd)

    async def close(self) -> None:
        self._until = 0.0
        if self._running is not None:
            await asyncio.wait([self._running])
        self._hastening.close()
