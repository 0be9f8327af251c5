"""One side's services on directories of their own, with a client connected to them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .accounting import Cgroup, pss_bytes, remove_everywhere
from .driver import Driver, MeasureError

START_SECONDS = 90.0
STOP_SECONDS = 30.0
_numbers = itertools.count()


class Node(ABC):
    """Used as a context manager. Everything of it lies in `place`, which stays until the whole run has ended."""

    side: str
    stop_signal = signal.SIGTERM
    replicas = 1  # of the service that has the content, where it can have several
    together = False  # services in one process, where there are several

    def __init__(self, base: Path) -> None:
        self.number = next(_numbers)
        self.place = base / f"{self.side}-{self.number}"
        self.namespace = f"bench-{os.getpid()}-{self.number}"

    @abstractmethod
    def command(self) -> Sequence[str]:
        """What starts the services; it ends with them, on `stop_signal`."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether they answer; asked until they do."""

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """What the client has to know."""

    @abstractmethod
    def run_true(self, image: str) -> Sequence[str]:
        """The command line that runs `true` in a container of this image and removes it."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """What the side's command line finds its services by."""

    def tidy(self) -> None:  # noqa: B027 - most sides have nothing elsewhere
        """Remove what lies outside of `place`."""

    def __enter__(self) -> Self:
        self.place.mkdir()
        # Where either is installed its state directory lies below /run, which is memory.
        _mount_tmpfs(self.place / "state")
        self.log = self.place / "log"
        self.cgroup = Cgroup.top(f"wherry-bench-{os.getpid()}-{self.place.name}")
        self._process: subprocess.Popen[bytes] | None = None
        self._driver: Driver | None = None
        try:
            self._start()
            self.driver.call("ping")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._driver is not None:
            self._driver.close()
        if self._process is not None:
            self._process.send_signal(self.stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        self.cgroup.end()
        if self._process is not None:
            self._process.wait()
        remove_everywhere(self.namespace)
        _unmount_below(self.place)
        self.tidy()

    @property
    def driver(self) -> Driver:
        """The client; a new one where the last measurement ended it."""
        if self._driver is None or not self._driver.alive:
            self._driver = Driver(self.side, self.settings(), self.cgroup.child("client"), self.place / "client.log")
            self._driver.call("ping")
        return self._driver

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
                env={**os.environ, **self.environment(), "PYTHONUNBUFFERED": "1"},
                preexec_fn=self.cgroup.child("node").joining,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self.ready():
            if self._process.poll() is not None:
                raise MeasureError(f"{self.side} ended with status {self._process.returncode}: {self._last_words()}")
            if time.monotonic() > deadline:
                raise MeasureError(f"{self.side} was not ready after {START_SECONDS:.0f} s: {self._last_words()}")
            time.sleep(0.02)

    def _last_words(self) -> str:
        said = self.log.read_text(errors="replace").strip().splitlines()
        return said[-1][-300:] if said else "nothing said"

    def pids(self) -> set[int]:
        """The node's processes: services and monitors, without its clients and what runs in containers."""
        return set(self.cgroup.child("node").pids())

    def pss(self, pids: set[int] | None = None) -> int:
        """Bytes of all the node's processes, or of these."""
        return pss_bytes(self.pids() if pids is None else pids)

    def run_cli(self, image: str) -> float:
        """Seconds that `run --rm IMAGE true` takes on the command line."""
        began = time.perf_counter()
        done = subprocess.run(
            self.run_true(image), env={**os.environ, **self.environment()}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
            preexec_fn=self.cgroup.child("client").joining,
        )  # fmt: skip
        took = time.perf_counter() - began
        if done.returncode:
            said = done.stdout.decode(errors="replace").strip().splitlines() or ["nothing said"]
            raise MeasureError(f"{self.run_true(image)[0]} ended with status {done.returncode}: {said[-1][-300:]}")
        return took


def _mount_tmpfs(place: Path) -> None:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0711", "tmpfs", str(place)], check=True)


def _unmount_below(place: Path) -> None:
    """Mounts that a failed measurement left, deepest first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    targets = [line.split(" ")[4] for line in lines]
    for target in reversed([t for t in targets if t.startswith(f"{place}/")]):
        subprocess.run(["umount", "--lazy", target], check=False, stderr=subprocess.DEVNULL)
