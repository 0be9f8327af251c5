"""The standard streams of every process, by its task: made, found again, read and written, and let go."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Generator
from datetime import datetime
from pathlib import Path

from wherry_shared.api.task import LogWindow, Output, Stdio, Taken
from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from wherry_shared.portions import Portions

from . import logfile, uris
from .inlet import Inlet
from .journal import Journal
from .logfile import Log, Place
from .outlet import STDERR, STDOUT, Budget, Outlet
from .shelf import Shelf
from .spool import Spool
from .watching import Watching

log = logging.getLogger("wherry.task")

PRUNE_SECONDS = 2.0
Name = tuple[str, str, str]
"""Namespace, container and exec id."""


class Carried:
    """What of one process's streams this service carries. `real`: what its shim is to open instead."""

    def __init__(self, stdio: Stdio, real: Stdio) -> None:
        self.stdio = stdio
        self.real = real
        self.outlet: Outlet | None = None
        self.inlet: Inlet | None = None
        self.journal: Journal | None = None
        self.directory: Path | None = None
        self.outputs: list[str] = []

    def started(self) -> None:
        """The process begins to run."""
        if self.outlet is not None:
            self.outlet.started()

    def ended(self) -> None:
        """The process has ended."""
        if self.outlet is not None:
            self.outlet.ended()
        if self.inlet is not None:
            self.inlet.close()
        if self.journal is not None:
            self.journal.ended()

    def rest(self) -> bool:
        """Let go of what an ended process's output takes, as long as nobody reads it; it can be taken up again."""
        if self.outlet is None or not self.outlet.idle:
            return False
        self.outlet.close()
        self.outlet = None
        return True

    def close(self) -> None:
        """Let go of everything; another service may find it again."""
        if self.outlet is not None:
            self.outlet.close()
        if self.inlet is not None:
            self.inlet.close()


NOTHING = Carried(Stdio(), Stdio())


class Streams:
    """The carried streams of all processes, and the logs."""

    def __init__(self, logs: Path) -> None:
        self.shelf = Shelf(logs)
        self._watching = Watching()
        self._budget = Budget()
        self._carried: dict[Name, Carried] = {}
        # Of processes that are gone, for as long as somebody has not read to the end.
        self._gone: dict[Name, list[Outlet]] = {}
        self._pruning: asyncio.TimerHandle | None = None
        # One at a time looks for the end of a long log in each namespace: what it takes of the loop is a turn for each.
        self._looking = Portions(1)

    # ---- a process comes and goes

    def make(self, name: Name, bundle: Path, stdio: Stdio, born: datetime | None = None) -> Stdio:
        """Prepare the streams of a new process; answers what its shim is to open. born: its container's creation.

        InvalidArgument, ResourceExhausted.
        """
        wanted = _over_the_bus(stdio)
        real = self._with_logs(name, stdio, born)
        if wanted:
            directory = bundle / "io" / _folder(name[2])
            try:
                directory.mkdir(parents=True, mode=0o700)
                for stream in wanted:
                    Spool.make(directory / stream) if stream != "stdin" else Inlet.make(directory)
                real = real.model_copy(update={stream: str(directory / stream) for stream in wanted})
            except OSError as e:
                raise ResourceExhausted(f"streams of {name[1]}: {e.strerror}") from None
        self._carry(name, bundle, stdio, real, started=False)
        return real

    def find(self, name: Name, bundle: Path, stdio: Stdio, *, started: bool, over: bool) -> None:
        """Take up the streams of a process of an earlier service."""
        real = self._with_logs(name, stdio, None, new=False)
        directory, wanted = bundle / "io" / _folder(name[2]), _over_the_bus(stdio)
        real = real.model_copy(update={stream: str(directory / stream) for stream in wanted})
        try:
            carried = self._carry(name, bundle, stdio, real, started=started)
        except ResourceExhausted as e:
            log.error("%s", e)
            return
        if over:
            carried.ended()

    def _carry(self, name: Name, bundle: Path, stdio: Stdio, real: Stdio, *, started: bool) -> Carried:
        carried = Carried(stdio, real)
        wanted = _over_the_bus(stdio)
        directory = bundle / "io" / _folder(name[2])
        try:
            if wanted and directory.is_dir():
                carried.directory = directory
                carried.outputs = [stream for stream in wanted if stream != "stdin"]
                if carried.outputs:
                    carried.outlet = Outlet(directory, carried.outputs, self._budget, opened=started)
                    carried.outlet.flow()
                if "stdin" in wanted:
                    carried.inlet = Inlet(directory)
        except OSError as e:
            carried.close()
            raise ResourceExhausted(f"streams of {name[1]}: {e.strerror}") from None
        if path := _log_of(real):
            carried.journal = Journal(path, self._watching)
        self._carried[name] = carried
        if carried.outlet is not None:
            self._prune_later()
        return carried

    def _with_logs(self, name: Name, stdio: Stdio, born: datetime | None, *, new: bool = True) -> Stdio:
        """`log://` with the path where this container's log lies."""
        found: dict[str, str] = {}
        for stream in (STDOUT, STDERR):
            uri = uris.parse(getattr(stdio, stream))
            if uri.scheme != uris.LOG or uri.path:
                continue
            if name[2] and new:
                raise InvalidArgument("log:// is for a container's first process")
            path = self.shelf.begin(name[0], name[1], born) if new else self.shelf.path(name[0], name[1])
            size, files = uris.log_limits(uri.query)
            found[stream] = f"log://{path}?max_size={size}&max_files={files}"
        return stdio.model_copy(update=found) if found else stdio

    def of(self, name: Name) -> Carried:
        """What is carried of a process; nothing, where it is unknown."""
        return self._carried.get(name, NOTHING)

    def real(self, name: Name, stdio: Stdio) -> Stdio:
        """What a process's shim is to open for it."""
        carried = self._carried.get(name)
        return stdio if carried is None else carried.real

    def retire(self, name: Name) -> None:
        """The process is deleted. Whoever reads its output may read on to the end."""
        carried = self._carried.pop(name, None)
        if carried is None:
            return
        if carried.directory is not None:
            shutil.rmtree(carried.directory, ignore_errors=True)
        if carried.outlet is not None:
            carried.outlet.ended()
            self._gone.setdefault(name, []).append(carried.outlet)
            carried.outlet = None
        if carried.journal is not None:
            carried.journal.ended()
        carried.close()

    def close(self) -> None:
        """At the service's end: let go of all."""
        if self._pruning is not None:
            self._pruning.cancel()
        for carried in self._carried.values():
            carried.close()
        for outlets in self._gone.values():
            for outlet in outlets:
                outlet.close()
        self._carried.clear()
        self._gone.clear()
        self._watching.close()

    # ---- reading and writing

    async def output(self, name: Name, after: str, patience: float) -> Output:
        """What a process writes. NotFound, FailedPrecondition."""
        gone = next((o for o in self._gone.get(name, ()) if after.startswith(f"{o.epoch}.")), None)
        if gone is not None:
            return await gone.read(after, patience)
        carried = self._carried.get(name)
        if carried is None:
            raise NotFound(f"process {name[2] or 'init'} of container {name[1]} is gone")
        if carried.outlet is None and carried.outputs and carried.directory is not None:
            carried.outlet = Outlet(carried.directory, carried.outputs, self._budget, opened=True)
            carried.outlet.ended()
            self._prune_later()
        if carried.outlet is not None:
            return await carried.outlet.read(after, patience)
        if carried.journal is not None:
            return await carried.journal.read(after, patience)
        where = carried.stdio.stdout or carried.stdio.stderr
        if not where:
            raise FailedPrecondition(f"container {name[1]} writes its output nowhere")
        kind = "FIFOs that a client has made" if uris.parse(where).scheme == uris.FIFO else where.partition("?")[0]
        raise FailedPrecondition(f"the output of container {name[1]} goes to {kind}: nobody else can attach")

    async def input(self, name: Name, writer: str, offset: int, data: bytes, patience: float) -> Taken:
        """Take bytes for a process's stdin. FailedPrecondition: it has none over the bus."""
        inlet = self.of(name).inlet
        if inlet is None:
            raise FailedPrecondition(f"container {name[1]} has no stdin over the bus")
        return await inlet.write(writer, offset, data, patience)

    def end_input(self, name: Name) -> None:
        """The end comes behind what stdin was given."""
        inlet = self.of(name).inlet
        if inlet is not None:
            inlet.end()

    async def logs(
        self, namespace: str, container: str, born: datetime | None, after: str, since: datetime | None,
        until: datetime | None, tail: int, patience: float,
    ) -> LogWindow:  # fmt: skip
        """A window of a container's log. FailedPrecondition: it keeps none."""
        running = self._carried.get((namespace, container, ""))
        journal = running.journal if running is not None else None
        if journal is None:
            path = self.shelf.of(namespace, container, born)
            if path is None:
                raise FailedPrecondition(f"container {container} keeps no log")
            journal = Journal(path, self._watching, over=True)
        if after:
            place = Place.parse(after)
        else:
            async with self._looking.of(namespace):
                with Log.open(journal.path) as found:
                    place = await _begin(found, since, tail)
        return await journal.window(place, logfile.text_of(until) if until else "", patience)

    # ---- time

    def _prune_later(self) -> None:
        if self._pruning is None:
            self._pruning = asyncio.get_running_loop().call_later(PRUNE_SECONDS, self._prune)

    def _prune(self) -> None:
        """Forget readers that are gone, and outputs that nobody reads any more."""
        self._pruning = None
        alive = 0
        for carried in self._carried.values():
            if carried.outlet is not None:
                carried.outlet.prune()
                alive += not carried.rest()
        for name, outlets in list(self._gone.items()):
            for outlet in list(outlets):
                outlet.prune()
                if not outlet.readers:
                    outlet.close()
                    outlets.remove(outlet)
            if not outlets:
                del self._gone[name]
        if alive or self._gone:
            self._prune_later()


async def _begin(found: Log, since: datetime | None, tail: int) -> Place:
    """Where the first window begins; of `since` and `tail` whatever gives less."""
    places = [found.since(logfile.text_of(since))] if since else [found.beginning()]
    if tail >= 0:
        places.append(await _by_turns(found.tail(tail)))
    return max(places, key=lambda place: (place.file, place.offset))


async def _by_turns(steps: Generator[None, None, Place]) -> Place:
    """Walk to the end; whatever else there is to do is done between two steps."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            place: Place = end.value
            return place
        await asyncio.sleep(0)


def _over_the_bus(stdio: Stdio) -> list[str]:
    streams = ["stdin", STDOUT] if stdio.terminal else ["stdin", STDOUT, STDERR]
    return [stream for stream in streams if uris.parse(getattr(stdio, stream)).scheme == uris.BUS]


def _log_of(stdio: Stdio) -> Path | None:
    for uri in (uris.parse(stdio.stdout), uris.parse(stdio.stderr)):
        if uri.scheme == uris.LOG:
            return Path(uri.path)
    return None


def _folder(exec_id: str) -> str:
    return f"exec-{exec_id}" if exec_id else "init"
