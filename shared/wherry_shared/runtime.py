"""What every service process does: settings, logging, signals, the bus, its databases, drain.

async def build(host: Host) -> Contract:
    database = await host.database(metadata.MIGRATIONS)
    return ImageService(Catalog(database))

def main(arguments: Sequence[str] | None = None) -> None:
    run("image", build, arguments)
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import functools
import gc
import json
import logging
import os
import platform
import re
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .backup import Backup, open_database
from .bus import Bus, connect
from .contract import Contract
from .errors import FailedPrecondition, InvalidArgument, Unavailable, WherryError
from .files import os_errors
from .heap import give_back
from .outbox import Outbox
from .sqlite import Database
from .values import check_identifier

log = logging.getLogger("wherry.runtime")

NODE_FILE = "node.json"
DRAIN_SECONDS = 10.0
_FLAGS = ("node", "root", "state", "nats", "creds", "instance", "log_level")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def default_node() -> str:
    """The host's name as an identifier: what does not fit becomes a dash."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname()).strip("-")[:76].strip("-")
    return name or "node"


@dataclass(frozen=True)
class Settings:
    """Where a service lives. Flags win over the environment (`WHERRY_ROOT` and so on), that over the defaults.

    root: what must survive a reboot. state: what must not; credentials lie in `creds` (default `<state>/creds`).
    nats: URLs, comma-separated. instance: distinguishes replicas on one root.
    """

    service: str
    node: str
    root: Path
    state: Path
    nats: str
    creds: Path
    instance: str = ""
    log_level: str = "INFO"
    options: dict[str, str] = field(default_factory=dict)

    @property
    def own_root(self) -> Path:
        return self.root / self.service

    @property
    def own_state(self) -> Path:
        return self.state / self.service

    @property
    def restores(self) -> bool:
        """Whether a damaged database is to be replaced by its backup: setting `restore`, `backup`."""
        return self.options.get("restore") == "backup"

    @property
    def metrics(self) -> str:
        """Where to tell its numbers: setting `metrics`, else `WHERRY_METRICS` for every service; "" is nowhere."""
        return self.options.get("metrics", os.environ.get("WHERRY_METRICS", ""))

    @classmethod
    def parse(cls, service: str, arguments: Sequence[str] | None = None) -> Settings:
        """From a command line and the environment; exits with a usage message on nonsense."""
        given, more = _plain(arguments) or _parsed(service, arguments)

        def chosen(flag: str, default: str) -> str:
            return given[flag] if flag in given else os.environ.get(f"WHERRY_{flag.upper()}", default)

        node = check_identifier(chosen("node", "") or default_node(), "node")
        state, creds, instance = Path(chosen("state", "/run/wherry")), chosen("creds", ""), chosen("instance", "")
        if instance and (not instance.isalnum() or not instance.isascii() or len(instance) > 64):
            raise InvalidArgument(f"instance {instance!r} stands in subjects: 1 to 64 letters and digits do")
        prefix = f"WHERRY_{service.upper()}_"
        options = {k.removeprefix(prefix).lower(): v for k, v in os.environ.items() if k.startswith(prefix)}
        options |= dict(item.partition("=")[::2] for item in more)
        return cls(
            service, node, Path(chosen("root", "/var/lib/wherry")).absolute(), state.absolute(),
            chosen("nats", "") or _nats_of(state), (Path(creds) if creds else state / "creds").absolute(), instance,
            chosen("log_level", "INFO").upper(), options,
        )  # fmt: skip


def _plain(arguments: Sequence[str] | None) -> tuple[dict[str, str], list[str]] | None:
    """Whole flags with their values, as a supervisor gives them: without argparse, whose use costs each service 1 MiB
    of its own. None for whatever else."""
    if arguments is None or len(arguments) % 2:
        return None
    given: dict[str, str] = {}
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in _FLAGS or value.startswith("-"):
            return None
        given[name] = value
    return given, []


def _parsed(service: str, arguments: Sequence[str] | None) -> tuple[dict[str, str], list[str]]:
    parser = argparse.ArgumentParser(prog=f"wherry-{service}", description=f"Wherry's {service} service.")
    for name in _FLAGS:
        parser.add_argument(f"--{name.replace('_', '-')}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of this service (its README)"
    )
    given = vars(parser.parse_args(arguments))
    more = given.pop("set")
    return {name: value for name, value in given.items() if value is not None}, more


def _nats_of(state: Path) -> str:
    """The URL that the node's supervisor wrote down, or NATS's own default."""
    try:
        return str(json.loads((state / NODE_FILE).read_text())["nats"])
    except (OSError, ValueError, KeyError):
        return "nats://127.0.0.1:4222"


class Stop:
    """What a signal asks of all of a process's services: to stop; `immediate`: with everything that they run."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.immediate = False

    def ask(self, number: int) -> None:
        self.immediate = self.immediate or number == signal.SIGINT
        self.asked.set()


class Host:
    """What `build` builds on: the settings, the bus, databases, and what has to be undone at the end."""

    def __init__(self, settings: Settings, bus: Bus, stack: AsyncExitStack, stop: Stop | None = None) -> None:
        self.settings = settings
        self.bus = bus
        self.instance = settings.instance or secrets.token_hex(8)
        self.metadata: dict[str, str] = {}
        self._stop = stop or Stop()
        self._stack = stack
        self.also: list[Contract] = []

    @property
    def immediate_stop(self) -> bool:
        """Whether what runs is to end with the service: SIGINT."""
        return self._stop.immediate

    async def database(self, migrations: Sequence[str], *, shared: bool = False) -> Database:
        """The service's database, with its outbox relayed. `shared`: replicas on the same root may have it open too.

        It is backed up beside itself (backup.py). FailedPrecondition: another process of this service has the root.
        """
        root = self.settings.own_root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not shared:
            self.lock(root / "lock")
        path = root / "metadata.db"
        database = await open_database(path, migrations, restore=self.settings.restores)
        self._stack.push_async_callback(database.close)
        backup = Backup(path)
        backup.start()
        self._stack.push_async_callback(backup.stop)
        outbox = Outbox(database, self.bus, shared=shared)
        outbox.start()
        self._stack.push_async_callback(outbox.stop)
        return database

    def lock(self, path: Path) -> None:
        """Hold `path` locked until this process ends. FailedPrecondition when another process holds it."""
        with os_errors(str(path)):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._stack.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(f"{path.parent} is in use by another {self.settings.service} service") from None

    def also_serve(self, implementation: Contract) -> None:
        """Serve a second contract of this service's, from the same moment on as the one that `build` answers."""
        self.also.append(implementation)

    def on_stop(self, undo: Callable[[], Awaitable[None]]) -> None:
        """Run `undo` at the end, after the last request and in reverse order."""
        self._stack.push_async_callback(undo)

    def plugin(self, **plugin: Any) -> None:
        """Tell introspection of a backend (fields of api.introspection.Plugin); its platform is this host's."""
        plugins = json.loads(self.metadata.get("plugins", "[]"))
        self.metadata["plugins"] = json.dumps([*plugins, {"platforms": [host_platform()], **plugin}])


Build = Callable[[Host], Awaitable[Contract]]


def run(service: str, build: Build, arguments: Sequence[str] | None = None) -> None:
    """Run a service until SIGTERM or SIGINT, then drain it. Exits 1 with one line when it cannot start."""
    run_together({service: build}, arguments)


def run_together(
    services: Mapping[str, Build], arguments: Sequence[str] | None = None,
    beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:  # fmt: skip
    """The same for several in one process, each with an identity, a connection and a database of its own.

    They stop one after the other, in this order. Where one cannot start or breaks, all end: decision 0020.
    beside: what else is to run, for ever; it is cancelled before anything stops.
    """
    names = "+".join(services)
    who = names if len(services) == 1 else "together %(name)s"
    try:
        parts = [(Settings.parse(service, arguments), build) for service, build in services.items()]
        log_to_stderr(who, parts[0][0].log_level)
        run_loop(_serve_all(parts, beside))
    except (WherryError, ExceptionGroup) as e:
        first: Exception = e
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        if not isinstance(first, WherryError):
            raise
        print(f"wherry-{names}: {first}", file=sys.stderr)  # noqa: T201 - the process's last word
        raise SystemExit(1) from None


def log_to_stderr(who: str, level: str) -> None:
    """`who` stands in each line. Setting a level writes to every logger there is, and so to pages that a forked process
    shares: not where it is what was set before the fork."""
    logging.basicConfig(stream=sys.stderr, format=f"%(asctime)s {who} %(levelname)s %(message)s")
    if logging.getLevelName(logging.root.level) != level:
        logging.root.setLevel(level)


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """As asyncio.run, on uvloop's loop; its buffer of 256 KiB takes memory as far as it is used."""
    import uvloop

    async def run_lean() -> None:
        loop = asyncio.get_running_loop()
        give_back(id(loop), loop.__sizeof__())
        await main

    uvloop.run(run_lean())


async def _serve_all(
    parts: Sequence[tuple[Settings, Build]], beside: Callable[[], Coroutine[Any, Any, None]] | None
) -> None:
    stop = Stop()
    os.umask(0o077)
    if len(parts) == 1 and beside is None:
        await _serve(*parts[0], stop, stop.asked)
        return
    async with asyncio.TaskGroup() as group:
        turns = [asyncio.Event() for _ in parts]
        tasks = [group.create_task(_serve(*part, stop, turn)) for part, turn in zip(parts, turns, strict=True)]
        other = group.create_task(beside()) if beside else None
        await stop.asked.wait()
        if other is not None:
            other.cancel()
            await asyncio.wait([other])
        for task, turn in zip(tasks, turns, strict=True):
            turn.set()
            await asyncio.wait([task])


async def _serve(settings: Settings, build: Build, stop: Stop, turn: asyncio.Event) -> None:
    """Serve until `turn`, which `stop` is followed by."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        bus = await _connect(settings)
        stack.push_async_callback(bus.transport.close)
        host = Host(settings, bus, stack, stop)
        await _at_home(host)
        await _export(host, stack)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.ask, number)
        implementation = await build(host)
        # What is there now stays to the end: without it, a full collection takes a fraction of the time.
        gc.collect()
        gc.freeze()
        for second in host.also:
            await bus.serve(second, instance=host.instance)
        server = await bus.serve(implementation, instance=host.instance, metadata=host.metadata)
        log.info("serving on node %s as %s", settings.node, server.instance)
        await turn.wait()
        log.info("stopping")
        await bus.drain(DRAIN_SECONDS)


async def _at_home(host: Host) -> None:
    """Tell discovery where this is at home. FailedPrecondition: another node of this name is on the bus."""
    from .bus import twins

    settings = host.settings
    with suppress(OSError):
        settings.own_root.mkdir(parents=True, exist_ok=True, mode=0o700)
    home = host.metadata[twins.HOME] = twins.home_of(settings.own_root)
    await twins.refuse_twin(host.bus.transport, settings.node, settings.service, home)


async def _export(host: Host, stack: AsyncExitStack) -> None:
    """Tell discovery of this process, and Prometheus too where that is wanted."""
    settings = host.settings
    host.metadata["package"] = package_version(f"wherry-{settings.service}")
    if settings.metrics:
        from .metrics import Exporter

        about = {
            "service": settings.service, "version": host.metadata["package"], "node": settings.node,
            "instance": host.instance,
        }  # fmt: skip
        exporter = Exporter(host.bus, about)
        stack.push_async_callback(exporter.close)
        host.metadata["metrics"] = await exporter.open(settings.metrics)


async def _connect(settings: Settings) -> Bus:
    from .bus import credentials

    own = credentials.find(settings.creds, settings.service)
    identities = credentials.Identities(settings.creds)
    servers = [u for u in settings.nats.split(",") if u]
    loop = asyncio.get_running_loop()
    give_up = loop.time() + 15.0
    while True:
        try:
            return await connect(
                servers, node=settings.node, name=f"{settings.service}@{settings.node}", seed=own.seed,
                inbox_prefix=own.inbox_prefix, identity_of=identities, direct=settings.state,
            )  # fmt: skip
        except Unavailable:
            if loop.time() > give_up:
                raise
            await asyncio.sleep(0.1)


def host_platform() -> dict[str, str]:
    """What runs on this machine, in OCI's words (fields of values.Platform)."""
    machine = platform.machine()
    return {"os": sys.platform, "architecture": _ARCHITECTURES.get(machine, machine)}


@functools.cache
def package_version(distribution: str) -> str:
    """The installed version of one of our distributions; "0" when run without being installed."""
    with suppress(PackageNotFoundError):
        return version(distribution)
    return "0"
