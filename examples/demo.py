"""The whole house once through: `make demo`.

Builds a redis image from Debian's packages, serves it from Debian's registry, starts a node on a private root, runs
`redis.py` against it while `watch_events.py` prints what happens, stops everything and proves that nothing is left.
Needs root; everything it makes lies in one temporary directory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from images import AptError, Registry, RegistryError, redis
from leftovers import Watch

HERE = Path(__file__).resolve().parent
WHERRY = str(Path(sys.executable).with_name("wherry"))
READY = 60.0  # seconds that a node may take to answer, on a busy machine
STOP = 30.0  # seconds that a node may take to take its containers down
QUIET = 0.5  # seconds without a further event after which the last one has been printed


class DemoError(Exception):
    """A part of the demo did not do its part; the message says which and what it said."""


def say(words: str) -> None:
    print(f"==> {words}", flush=True)


class Part:
    """A program of the demo: its lines are printed behind its name, and can be waited for.

    A process group of its own keeps a terminal's Ctrl-C away from it: the demo stops its parts in order.
    """

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", process_group=0,
        )  # fmt: skip
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._last = time.monotonic()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"{self.name:>8} | {line}", end="", flush=True)
            with self._news:
                self._lines.append(line.strip())
                self._last = time.monotonic()
                self._news.notify_all()

    def says(self, word: str, timeout: float) -> None:
        """Wait for a line that starts with `word`."""
        deadline = time.monotonic() + timeout
        with self._news:
            while not any(line.startswith(word) for line in self._lines):
                if self._process.poll() is not None:
                    raise DemoError(f"{self.name} ended with status {self._process.returncode}")
                if time.monotonic() > deadline:
                    raise DemoError(f"{self.name} did not say {word!r} within {timeout:.0f} s")
                self._news.wait(0.1)

    def falls_quiet(self, timeout: float) -> None:
        """Wait until it has printed nothing for a moment, at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < min(deadline, self._last + QUIET):
            time.sleep(0.05)

    def status(self, timeout: float) -> int:
        """Its exit status, once it has ended by itself."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise DemoError(f"{self.name} is not done after {timeout:.0f} s") from None
        self._reader.join(5)
        return status

    def stop(self, timeout: float) -> None:
        """Interrupt it as Ctrl-C would, and see it end; killed, and reported, where it does not."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self.status(timeout)
        except DemoError:
            self._process.kill()
            self._process.wait()
            raise DemoError(f"{self.name} did not stop within {timeout:.0f} s and was killed") from None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def running(name: str, command: Sequence[str], environment: dict[str, str], stop: float = 10.0) -> Iterator[Part]:
    part = Part(name, command, environment)
    try:
        yield part
    finally:
        part.stop(stop)


@contextmanager
def node(place: Path, environment: dict[str, str]) -> Iterator[Part]:
    """A node on `place`, once it answers."""
    state, port = place / "state", str(free_port())
    command = [WHERRY, "up", "--root", str(place / "root"), "--state", str(state), "--port", port]
    with running("node", command, environment, STOP) as part:
        part.says("ready", READY)
        answer = subprocess.run([WHERRY, "info"], env=environment, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise DemoError(f"wherry info: {answer.stderr.strip()}")
        yield part


def play(place: Path) -> None:
    """All acts in their order; everything started here has ended when this returns, however it returns."""
    environment = {**os.environ, "WHERRY_STATE": str(place / "state"), "PYTHONUNBUFFERED": "1"}
    with ExitStack() as stack:
        say("building the redis image from Debian's packages (cached after the first time)")
        image = redis()
        say("serving it from Debian's docker-registry")
        reference = stack.enter_context(Registry()).push(image, "library/redis", "7")
        say(f"starting a node under {place}")
        stack.enter_context(node(place, environment))
        say("watching its events, with rights to nothing else")
        observer = [sys.executable, str(HERE / "watch_events.py")]
        rights = {"WHERRY_CREDS": str(place / "state" / "creds" / "observer.nk")}
        events = stack.enter_context(running("event", observer, {**environment, **rights}))
        events.says("watching", READY)
        say(f"running redis.py {reference}")
        example = [sys.executable, str(HERE / "redis.py"), reference]
        with running("redis", example, environment) as part:
            if status := part.status(120):
                raise DemoError(f"redis.py ended with status {status}")
        events.falls_quiet(5)
        say("stopping everything")


def perform() -> bool:
    """Play, then look for what is left; True where all went well and nothing is."""
    place = Path(tempfile.mkdtemp(prefix="wherry-demo-"))
    well = True
    with Watch(place) as watch:
        try:
            play(place)
        except (DemoError, AptError, RegistryError, KeyboardInterrupt) as error:
            say(f"failed: {str(error) or 'interrupted'}")
            well = False
    left = watch.leftovers()
    for line in left:
        say(f"left behind: {line}")
    if left:
        say(f"{place} stays for you to look at")  # and is not removed through a mount that may reach elsewhere
        return False
    shutil.rmtree(place)
    say(f"nothing is left: no process, no mount, none of {len(watch.seen_cgroups)} cgroups, no file")
    return well


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if os.geteuid() != 0:
        sys.exit("a node mounts and makes cgroups: run the demo as root")
    for number in (signal.SIGTERM, signal.SIGINT):  # in the background a shell has us ignore the latter
        signal.signal(number, signal.default_int_handler)
    sys.exit(0 if perform() else 1)


if __name__ == "__main__":
    main()
