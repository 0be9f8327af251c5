"""Real nats-servers for tests: each with its own directory and port, stoppable, killable, restartable on that port.

    with NatsServer(tmp_path) as server:
        await Connection.connect([server.url], ...)

Test folders are not packages here: a conftest.py puts this folder on sys.path, then `from natsd import NatsServer`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import nkeys

BINARY = next(
    str(path)
    for path in (Path(sys.executable).with_name("nats-server"), Path(shutil.which("nats-server") or "nats-server"))
    if path.exists()
)
START_SECONDS = 20.0
# Below the kernel's range for outgoing connections: a client that retries a dead port there may reach itself.
PORTS = range(20000, 32000)


@dataclass(frozen=True)
class Key:
    """An nkey user: the seed is for the client, the public key for the server's configuration."""

    seed: bytes
    public: str


def make_key() -> Key:
    """A fresh nkey user."""
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return Key(seed, nkeys.from_seed(bytearray(seed)).public_key.decode())


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at the moment."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class NatsServer:
    """One nats-server on 127.0.0.1. `config` is added to its configuration file; `jetstream` keeps streams in `root`.

    Start it from the main thread: the server is killed with the thread that started it.
    """

    def __init__(
        self, root: Path, *, config: str = "", jetstream: bool = False, port: int = 0, procs: int | None = None
    ) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.config = config
        self.jetstream = jetstream
        self.port = port
        self.procs = procs
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """All that the server has written so far."""
        path = self.root / "nats.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start it and wait until it greets; the second time on the port of the first."""
        if self.process is not None:
            raise RuntimeError("it runs already")
        for _ in range(20):
            port = self.port or free_port()
            if self._start_on(port):
                self.port = port
                return
            if self.port:
                break
        raise RuntimeError(f"nats-server did not start:\n{self.log[-2000:]}")

    def stop(self) -> None:
        """End it in good order; nothing happens when it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """`kill -9`."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Let it hold its connections and answer nothing."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        while not _stopped(process.pid):
            time.sleep(0.001)

    def thaw(self) -> None:
        """End `freeze`."""
        self._running().send_signal(signal.SIGCONT)

    def reload(self, config: str) -> None:
        """Put another `config` into force."""
        self.config = config
        self._write_config(self.port)
        self._running().send_signal(signal.SIGHUP)

    def __enter__(self) -> NatsServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise RuntimeError("it does not run")
        return self.process

    def _write_config(self, port: int) -> Path:
        path = self.root / "nats.conf"
        text = f'host: "127.0.0.1"\nport: {port}\n'
        if self.jetstream:
            text += f'jetstream {{ store_dir: "{self.root / "jetstream"}" }}\n'
        path.write_text(text + self.config)
        return path

    def _start_on(self, port: int) -> bool:
        environment = dict(os.environ)
        if self.procs is not None:
            environment["GOMAXPROCS"] = str(self.procs)
        with (self.root / "nats.log").open("ab") as log:
            process = subprocess.Popen(
                [BINARY, "-c", str(self._write_config(port))],
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=_die_with_parent,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            if _greets(port):
                self.process = process
                return True
            time.sleep(0.01)
        process.kill()
        process.wait()
        return False

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _stopped(pid: int) -> bool:
    """Whether each thread of the process has come to its stop."""
    try:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return False  # one has just ended
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def _greets(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
        return probe.recv(5) == b"INFO "
    return False
