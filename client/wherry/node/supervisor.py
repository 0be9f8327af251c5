"""The supervisor: one process that loads the services' code once, forks them all, and starts again what dies.

It runs no event loop and no threads, so that forking it is safe at any time, and the services share its memory.
SIGINT takes the node down with everything that runs on it; SIGTERM stops the services and lets containers live.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib
import json
import logging
import os
import pwd
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

from wherry_shared.bus import credentials
from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound, WherryError
from wherry_shared.files import os_errors
from wherry_shared.runtime import NODE_FILE, run_together

from . import owners
from .preload import preload
from .server import NatsServer, find_binary, free_port

BACKOFF_FIRST, BACKOFF_MAX, STEADY_SECONDS = 0.1, 5.0, 10.0
NATS_BACKOFF_MAX = 1.0  # callers wait five seconds for the bus
STOP_SECONDS = 20.0
# Only these need root: they make and remove what belongs to any user, mount, and run.
PRIVILEGED = frozenset({"snapshot", "diff", "task"})
SCALABLE = frozenset({"content"})
# diff forks its workers, which no process with threads may do.
ALONE = frozenset({"diff"})
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Plan:
    """What `wherry up` was asked for. port 0: that of before, or any free one. user: who runs what needs no root ("":
    this user).

    together: the services that share a process; with `user` two, one for those that need root.
    """

    root: Path
    state: Path
    node: str
    port: int = 0
    nats: str = ""
    scale: dict[str, int] = field(default_factory=dict)
    together: frozenset[str] = frozenset()
    user: str = ""
    log_level: str = "WARNING"


@dataclass
class Child:
    """A process to be kept alive."""

    name: str
    start: Callable[[], int]
    pid: int = 0
    started: float = 0.0
    backoff: float = BACKOFF_FIRST
    due: float = 0.0
    serves: tuple[str, ...] = ()


class Supervisor:
    """Brings a node up and keeps it up: `Supervisor(plan).run()`.

    beside: what else is to run, by its name; it is called with the state directory.
    """

    def __init__(
        self, plan: Plan, say: Callable[[str], None] = print, beside: Mapping[str, Callable[[Path], None]] | None = None
    ) -> None:
        self._plan = plan
        self._beside = beside or {}
        self._say = say
        self._children: dict[str, Child] = {}
        self._server: NatsServer | None = None
        self._nats: subprocess.Popen[bytes] | None = None
        self._locks: list[int] = []
        self._wake_read, self._wake_write = -1, -1
        self._stopping = 0
        self._nats_started = self._nats_due = 0.0
        self._nats_backoff = BACKOFF_FIRST
        self._probe = 0
        self._held: list[bytes] = []
        self._url = ""

    def run(self) -> int:
        """Until SIGINT or SIGTERM. Answers the exit code. FailedPrecondition: another node has the directories,
        or the name."""
        services = self._services()
        self._prepare(list(services))
        logging.root.setLevel(self._plan.log_level)  # for all who are forked
        self._watch_signals()
        try:
            self._start_nats()
            if self._plan.nats:
                self._refuse_twin()
            self._held = preload(services)
            for names in self._groups(services):
                for number in range(self._plan.scale.get(names[0], 1)):
                    self._add(names, number, services)
            self._add_probe(sum(self._plan.scale.get(name, 1) for name in services))
            for name, main in self._beside.items():
                self._add_beside(name, main)
            if not any(len(c.serves) > 1 and "task" in c.serves for c in self._children.values()):
                self._add_keeper()
            self._loop()
        finally:
            self._stop_all()
        return 0

    # ---- before anything runs

    def _services(self) -> dict[str, str]:
        """The services installed here, `name -> module:function`."""
        found = {e.name: e.value for e in entry_points(group="wherry.services")}
        missing = set(credentials.CALLS) - set(found)
        if missing:
            raise NotFound(
                f"these services are not installed: {', '.join(sorted(missing))} (pip install 'wherry[node]')"
            )
        unknown = set(self._plan.scale) - SCALABLE
        if unknown:
            raise InvalidArgument(f"only {', '.join(sorted(SCALABLE))} can be scaled, not {', '.join(sorted(unknown))}")
        self._check_together(found)
        # task first: it re-adopts what runs before anybody asks for it.
        return dict(sorted(found.items(), key=lambda item: (item[0] != "events", item[0] != "task", item[0])))

    def _check_together(self, found: Mapping[str, str]) -> None:
        together = self._plan.together
        apart = (together & ALONE) | (together - set(found)) | {n for n in together if self._plan.scale.get(n, 1) > 1}
        if apart:
            raise InvalidArgument(f"these cannot share a process: {', '.join(sorted(apart))}")

    def _groups(self, services: Iterable[str]) -> list[list[str]]:
        """The names of the services that each process is to have; task is the first to stop, and events the last."""
        found: dict[str, list[str]] = {}
        for name in services:
            rights = "root" if self._plan.user and name in PRIVILEGED else "all"
            found.setdefault(rights if name in self._plan.together else name, []).append(name)
        return [sorted(names, key=lambda name: (name != "task", name == "events")) for names in found.values()]

    def _prepare(self, services: Sequence[str]) -> None:
        if self._plan.log_level not in logging.getLevelNamesMapping():
            raise InvalidArgument(f"there is no log level {self._plan.log_level!r}")
        os.umask(0o077)
        shared_mode = 0o711 if self._plan.user else 0o700
        for directory in (self._plan.root, self._plan.state):
            with os_errors(str(directory)):
                directory.mkdir(parents=True, exist_ok=True)
                directory.chmod(shared_mode)
                self._lock(directory)
        creds = self._plan.state / "creds"
        credentials.issue(creds, self._plan.node)
        own = [name for name in services if name not in PRIVILEGED]
        if self._plan.user:
            self._hand_over(creds, own)
        elif any((creds / f"{name}.nk").stat().st_uid != os.geteuid() for name in own):
            self._take_back(creds, own)

    def _lock(self, directory: Path) -> None:
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise FailedPrecondition(
                f"a node already runs on {directory}, or a process of one has not ended yet"
            ) from None
        self._locks.append(fd)

    def _hand_over(self, creds: Path, services: Sequence[str]) -> None:
        """Give these services' own files to their user, and nothing else."""
        try:
            user = pwd.getpwnam(self._plan.user)
        except KeyError:
            raise NotFound(f"no user {self._plan.user!r} on this host") from None
        creds.chmod(0o711)
        os.chown(creds / credentials.IDENTITIES, 0, user.pw_gid)
        (creds / credentials.IDENTITIES).chmod(0o640)
        for name in services:
            os.chown(creds / f"{name}.nk", user.pw_uid, user.pw_gid)
            for parent in (self._plan.root, self._plan.state):
                (parent / name).mkdir(exist_ok=True)
                owners.give(parent / name, user.pw_uid, user.pw_gid)

    def _take_back(self, creds: Path, services: Sequence[str]) -> None:
        """An earlier start gave these services' files to a user that there is none of now; their seeds come last."""
        uid, gid = os.geteuid(), os.getegid()
        creds.chmod(0o700)
        os.chown(creds / credentials.IDENTITIES, uid, gid)
        (creds / credentials.IDENTITIES).chmod(0o600)
        for name in services:
            for parent in (self._plan.root, self._plan.state):
                owners.give(parent / name, uid, gid)
        for name in services:
            os.chown(creds / f"{name}.nk", uid, gid)

    def _watch_signals(self) -> None:
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_stop)

    def _on_stop(self, number: int, frame: object) -> None:
        self._stopping = number

    def _start_nats(self) -> None:
        plan = self._plan
        if not plan.nats:
            config = plan.state / "nats.conf"
            self._server = NatsServer(
                find_binary(), plan.port or free_port(config), plan.node, plan.root / "nats", config,
                plan.state / "creds" / credentials.NATS_USERS,
            )  # fmt: skip
            self._server.write_config()
        self._run_nats()

    def _run_nats(self) -> None:
        """Start the embedded server, if it is ours to start, and write down where the node is."""
        plan = self._plan
        url = plan.nats
        if self._server is not None:
            self._nats = self._server.start(_detach_from_terminal, self._locks)
            url = self._server.url
        known: dict[str, object] = {"nats": url, "node": plan.node, "root": str(plan.root), "pid": os.getpid()}
        if self._nats is not None:
            known["nats_pid"] = self._nats.pid
        self._url = url
        temporary = plan.state / f"{NODE_FILE}.new"
        try:
            temporary.write_text(json.dumps(known))
            os.replace(temporary, plan.state / NODE_FILE)
        except OSError as e:  # a full disk, say; all that is new in it is a pid
            if not self._children:
                raise
            _complain(f"{temporary}: {e.strerror}")

    # ---- children

    def _add(self, names: Sequence[str], number: int, entries: Mapping[str, str]) -> None:
        label = f"{names[0]}-{number}" if self._plan.scale.get(names[0], 1) > 1 else "+".join(names)

        def start() -> int:
            name = names[0] if len(names) == 1 else "together"
            return self._fork(name, lambda: self._serve({name: entries[name] for name in names}, child))

        child = self._children[label] = Child(label, start, serves=tuple(names))

    def _serve(self, entries: Mapping[str, str], child: Child) -> None:
        if self._plan.user and PRIVILEGED.isdisjoint(entries):
            user = pwd.getpwnam(self._plan.user)
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            _die_with_parent()
        plan = self._plan
        arguments = ["--node", plan.node, "--nats", self._url, "--root", str(plan.root), "--state", str(plan.state),
                     "--log-level", plan.log_level]  # fmt: skip
        modules = {name: importlib.import_module(entry.partition(":")[0]) for name, entry in entries.items()}
        if len(modules) == 1:
            ((name, module),) = modules.items()
            getattr(module, entries[name].partition(":")[2])(arguments)
        else:
            from .keeper import keep

            builds = {name: module.build for name, module in modules.items()}
            keeping = functools.partial(keep, plan.state, boot=not child.started) if "task" in builds else None
            run_together(builds, arguments, keeping)

    def _fork(self, name: str, main: Callable[[], None]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            _detach_from_terminal()
            _set_name(f"wherry-{name}")
            main()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)

    def _add_probe(self, services: int) -> None:
        """A child that ends once every service answers on the bus, and says so."""
        from .ready import wait_until_ready

        plan = self._plan
        self._probe = self._fork(
            "probe", lambda: wait_until_ready(self._url, plan.node, plan.state / "creds", services)
        )

    def _refuse_twin(self) -> None:
        """FailedPrecondition when another node has this one's name. A child looks, for no event loop runs here."""
        from .ready import refuse_twin

        plan = self._plan
        reader, writer = os.pipe()

        def look() -> None:
            try:
                refuse_twin(self._url, plan.node, plan.state / "creds", plan.root)
            except FailedPrecondition as e:
                os.write(writer, str(e).encode())

        pid = self._fork("probe", look)
        os.close(writer)
        with open(reader, "rb") as told:
            refusal = told.read().decode()
        os.waitpid(pid, 0)
        if refusal:
            raise FailedPrecondition(refusal)

    def _add_beside(self, name: str, main: Callable[[Path], None]) -> None:
        self._children[name] = Child(name, lambda: self._fork(name, lambda: self._run_beside(main)))

    def _run_beside(self, main: Callable[[Path], None]) -> None:
        """What it forks, a command in the foreground say, outlives the node: it must not keep the next one out."""
        for fd in self._locks:
            os.close(fd)
        main(self._plan.state)

    def _add_keeper(self) -> None:
        """A child that starts containers again by their restart policies."""
        from .keeper import serve

        plan = self._plan
        child = Child("keeper", lambda: self._fork("keeper", main))

        def main() -> None:
            serve(plan.state, plan.log_level, boot=not child.started)

        self._children["keeper"] = child

    def _loop(self) -> None:
        while not self._stopping:
            now = time.monotonic()
            for child in self._children.values():
                if not child.pid and child.due <= now:
                    child.pid, child.started = child.start(), now
            self._reap()
            if self._server is not None and self._nats is None and self._nats_due <= time.monotonic():
                self._restart_nats()
            waiting = [c.due - now for c in self._children.values() if not c.pid]
            if self._server is not None and self._nats is None:
                waiting.append(self._nats_due - now)
            select.select([self._wake_read], [], [], max(0.0, min([1.0, *waiting])))
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._ended(pid, os.waitstatus_to_exitcode(status))

    def _ended(self, pid: int, code: int) -> None:
        if pid == self._probe:
            self._say("ready" if code == 0 else "not every service answers yet; see the log")
            return
        if self._nats is not None and pid == self._nats.pid:
            self._nats.returncode = code
            if not self._stopping:
                self._schedule_nats(f"nats-server {_how(code)}; starting it again")
            return
        for child in self._children.values():
            if child.pid == pid:
                self._schedule(child, code)

    def _schedule(self, child: Child, code: int) -> None:
        now = time.monotonic()
        child.pid = 0
        if now - child.started > STEADY_SECONDS:
            child.backoff = BACKOFF_FIRST
        child.due = now + child.backoff
        child.backoff = min(child.backoff * 2, BACKOFF_MAX)
        if not self._stopping:
            _complain(f"{child.name} {_how(code)}; starting it again")

    def _schedule_nats(self, why: str) -> None:
        """At once after a long life, else later and later."""
        now = time.monotonic()
        if now - self._nats_started > STEADY_SECONDS:
            self._nats_backoff, self._nats_due = BACKOFF_FIRST, now
        else:
            self._nats_due = now + self._nats_backoff
            self._nats_backoff = min(self._nats_backoff * 2, NATS_BACKOFF_MAX)
        self._nats = None
        _complain(why)

    def _restart_nats(self) -> None:
        """Containers and services wait for it; what keeps it from starting, a full disk say, is no reason to end."""
        self._nats_started = time.monotonic()
        try:
            self._run_nats()
        except (WherryError, OSError) as e:
            self._nats_started = time.monotonic()
            self._schedule_nats(f"{e}; trying again")

    # ---- the end

    def _stop_all(self) -> None:
        """The task service first, while its events can still be stored; nats-server last."""
        self._stopping = self._stopping or signal.SIGTERM
        # The keeper first of all, or it would start again what is taken down.
        self._stop([c for c in self._children.values() if c.name == "keeper"], signal.SIGTERM)
        self._stop([c for c in self._children.values() if "task" in c.serves], self._stopping)
        self._stop([c for c in self._children.values() if "events" not in c.serves], signal.SIGTERM)
        self._stop(list(self._children.values()), signal.SIGTERM)
        if self._nats is not None and self._nats.returncode is None:
            self._nats.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._nats.wait(5.0)
            if self._nats.returncode is None:
                self._nats.kill()
                self._nats.wait()
        with contextlib.suppress(OSError):  # gone, or on a disk that cannot be written any more
            (self._plan.state / NODE_FILE).unlink()

    def _stop(self, children: list[Child], number: int) -> None:
        for child in children:
            if child.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, number)
        give_up = time.monotonic() + STOP_SECONDS
        while any(c.pid for c in children) and time.monotonic() < give_up:
            self._reap()
            if any(c.pid for c in children):
                time.sleep(0.01)
        for child in children:
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
                child.pid = 0


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _detach_from_terminal() -> None:
    """Ctrl-C reaches the supervisor alone, and nobody outlives it."""
    os.setsid()
    _die_with_parent()


def _set_name(name: str) -> None:
    _libc.prctl(15, name.encode()[:15], 0, 0, 0)


def _complain(text: str) -> None:
    print(f"wherry: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the supervisor's log is its stderr


def _how(code: int) -> str:
    return f"ended with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
