"""What deploy/ says, read back as processes' settings: for tests that start a node's parts the way it starts them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from natsd import BINARY

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
UNITS = DEPLOY / "systemd"
COMPOSE = ROOT / "docker-compose.yml"
WHERRY = str(Path(sys.executable).with_name("wherry"))
START_SECONDS = 20.0
_YAML_TO_JSON = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)"


def outside() -> dict[str, str]:
    """The environment without anything of Wherry's, which the caller's shell may have set."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WHERRY_")}


def compose(settings: Mapping[str, str]) -> dict[str, Any]:
    """docker-compose.yml as a compose program understands it, with `settings` in the place of its variables."""
    environment = {**outside(), **settings}
    for program in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(program[0]):
            command = [*program, "-f", str(COMPOSE), "config", "--format", "json"]
            said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if said.returncode == 0 and said.stdout.startswith("{"):  # docker-compose 1.29 answers with its usage
                return dict(json.loads(said.stdout))
    # The first generation, Debian's 1.29, writes YAML alone; it and its YAML library are of the system's Python.
    said = subprocess.run(
        ["docker-compose", "-f", str(COMPOSE), "config"], env=environment, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    command = ["/usr/bin/python3", "-c", _YAML_TO_JSON]
    return dict(json.loads(subprocess.run(command, input=said.stdout.encode(), capture_output=True, check=True).stdout))


def mounts(service: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """A composed service's folders: target -> (the host's, mode)."""
    found = {}
    for volume in service.get("volumes", ()):
        if isinstance(volume, str):
            source, target, *mode = volume.split(":")
            found[target] = (source, mode[0] if mode else "rw")
        else:
            mode = ["ro"] if volume.get("read_only") else []
            found[volume["target"]] = (volume["source"], ",".join([*mode, *_propagation(volume)]) or "rw")
    return found


def _propagation(volume: Mapping[str, Any]) -> list[str]:
    return [word for word in [(volume.get("bind") or {}).get("propagation")] if word]


def unit(name: str, instance: str = "") -> dict[str, list[str]]:
    """A unit's settings with its drop-ins', in their order: `unit("wherry@.service", "task")`. `%i` is filled in."""
    full = name.replace("@.", f"@{instance}.")
    lines = (UNITS / name).read_text().splitlines()
    for drop_in in sorted((UNITS / f"{full}.d").glob("*.conf")):
        lines += drop_in.read_text().splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        key, separator, value = line.partition("=")
        if separator and not line.startswith(("#", ";")):
            found.setdefault(key, []).append(value.replace("%i", instance))
    return found


def unit_environment(settings: Mapping[str, list[str]]) -> dict[str, str]:
    """What the unit's Environment= lines set."""
    return dict(word.partition("=")[::2] for line in settings["Environment"] for word in shlex.split(line))


def greets(port: int) -> bool:
    """Whether a nats-server answers there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
        return probe.recv(5) == b"INFO "
    return False


@contextmanager
def running(
    command: Sequence[str | Path], environment: Mapping[str, str], *, user: int | None = None, log: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with this environment and no other, ended in good order with the block."""
    own: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    with open(log or os.devnull, "ab") as out:
        process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            preexec_fn=_die_with_parent, **own,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def nats(config: Path, environment: Mapping[str, str], port: int, log: Path) -> Iterator[None]:
    """A nats-server on one of deploy/nats's files; it listens on `port` when the block begins."""
    with running([BINARY, "--config", config], {**outside(), **environment}, log=log) as process:
        deadline = time.monotonic() + START_SECONDS
        while not greets(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"nats-server does not come up on {config}:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)
        yield


def install_nats(place: Path, users: Path) -> Path:
    """deploy/nats as it is installed: the files, and beside them the folder that holds the table of users."""
    shutil.copytree(DEPLOY / "nats", place, dirs_exist_ok=True)
    (place / "users").symlink_to(users)
    return place


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
