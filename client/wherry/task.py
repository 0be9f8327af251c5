"""A task, and the processes in it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal as signals
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from wherry_shared.api.task import KEPT_MAX, Exit, ProcessInfo, Stats
from wherry_shared.api.task import Process as State
from wherry_shared.api.task import Stdio as Paths
from wherry_shared.errors import DeadlineExceeded, FailedPrecondition, NotFound, Unavailable, WherryError
from wherry_shared.values import Mount

from .handing import handed
from .stdio import Collected, Pipes, Stdio
from .streaming import OUTAGE_SECONDS, Streaming, carrier
from .undo import done, made

if TYPE_CHECKING:
    from .client import Client
    from .container import Container

PATIENCE = 5.0


@dataclass(frozen=True)
class ExitStatus:
    """How a process ended: its code, or 128+n after signal n, and when."""

    code: int
    exited_at: datetime

    def __int__(self) -> int:
        return self.code


@dataclass(frozen=True)
class Completed:
    """A process that ran to its end, and what it wrote (each stream up to 16 MiB; `truncated` when there was more)."""

    code: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False


class Process:
    """A process in a container: a task's init (exec_id "") or one that `task.exec` started."""

    def __init__(self, client: Client, container_id: str, exec_id: str, pipes: Pipes | Streaming | None) -> None:
        self.client = client
        self.container_id = container_id
        self.exec_id = exec_id
        self.pid = 0
        self._pipes = pipes
        self._background: set[asyncio.Task[None]] = set()
        self._started = False
        self._stdin_ended = False

    async def start(self) -> int:
        """Let it run; answers its pid."""
        if self._pipes is not None:
            self._pipes.begin()
        self.pid = await self.client.tasks.start(self.container_id, self.exec_id)
        self._started = True
        if self._pipes is not None:
            self._pipes.started()
        if self._stdin_ended:
            self._close_stdin_soon()
        return self.pid

    @property
    def started(self) -> bool:
        """Whether it was told to run."""
        return self._started

    async def wait(self) -> ExitStatus:
        """Wait for its end, also after the fact, through restarts of services and bus. NotFound once deleted.

        Unavailable: its streams are closed, so it is gone, and for a minute nobody is there to tell how it ended.
        """
        exit = await self._exit()
        if self._pipes is not None:
            await self._pipes.drained()
        return ExitStatus(exit.exit_status, exit.exited_at)

    async def _exit(self) -> Exit:
        loop = asyncio.get_running_loop()
        pause, since = 0.05, 0.0
        while True:
            try:
                exit = await self.client.tasks.wait(self.container_id, self.exec_id, PATIENCE)
            except (Unavailable, DeadlineExceeded) as e:
                # A restarted service or bus knows the answer again: the exit is on disk, not in the air.
                since = since or loop.time()
                if loop.time() - since > OUTAGE_SECONDS and self._pipes is not None and self._pipes.closed:
                    raise Unavailable(f"how {self.container_id} ended, nobody is there to tell: {e}") from None
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)
                continue
            if exit is not None:
                return exit
            pause, since = 0.05, 0.0

    async def state(self) -> State:
        """Its state now."""
        return await self.client.tasks.get(self.container_id, self.exec_id)

    async def kill(self, signal: int = signals.SIGTERM, *, all: bool = False) -> None:
        """Send a signal; `all`: to every process of the container. NotFound when it has ended."""
        await self.client.tasks.kill(self.container_id, int(signal), self.exec_id, all)

    async def resize(self, width: int, height: int) -> None:
        """Set its terminal's size, in characters."""
        await self.client.tasks.resize(self.container_id, width, height, self.exec_id)

    async def delete(self, *, force: bool = False) -> ExitStatus:
        """Remove it once it has ended (or with `force` whatever it does); answers how it ended."""
        try:
            exit = await self.client.tasks.delete(self.container_id, self.exec_id, force)
        finally:
            self.detach()
        return ExitStatus(exit.exit_status, exit.exited_at)

    async def attach(self, stdio: Stdio) -> None:
        """Join the streams of a process that somebody started, from now on; several may, each at its own pace.

        `stdin` is written to, and stays open when the caller's ends. NotFound: the process is gone.
        FailedPrecondition: its streams are neither on the bus nor in a log.
        """
        self.detach()
        joined = Streaming(self.client, self.container_id, self.exec_id, stdio, joining=True)
        await joined.join()
        self._pipes, self._started = joined, True

    async def parted(self) -> None:
        """Return when the detach keys were typed. Unavailable, or another error: the streams were lost."""
        if self._pipes is None:
            raise FailedPrecondition("nothing is attached")
        await self._pipes.parted()

    def check_output(self) -> None:
        """Raise what kept some of its output from being written by us (an Unavailable), if anything has."""
        failure = self._pipes.failure if self._pipes is not None else None
        if failure is not None:
            raise failure

    def carry(self) -> None:
        """Prepare our side of the streams, before the process is made."""
        if self._pipes is not None:
            self._pipes.start(self._close_stdin_soon)

    def detach(self) -> None:
        """Let go of stdio; the process goes on."""
        for work in self._background:
            work.cancel()
        if self._pipes is not None:
            self._pipes.close()
            self._pipes = None

    def _close_stdin_soon(self) -> None:
        self._stdin_ended = True
        if not self._started:
            return  # there is nobody to tell yet; `start` will
        task = asyncio.get_running_loop().create_task(self._close_stdin())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _close_stdin(self) -> None:
        if self._pipes is not None:
            self._pipes.end_stdin()
        pause = 0.05
        while True:
            try:
                await self.client.tasks.close_stdin(self.container_id, self.exec_id)
            except (Unavailable, DeadlineExceeded):
                # Who reads to the end of its input would never end itself, were it not told of that.
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)
                continue
            except WherryError:
                pass  # it has ended meanwhile
            return


class Task(Process):
    """The running thing of a container. `async with` kills and deletes it at the end."""

    async def exec(
        self, args: Sequence[str], *, stdio: Stdio | None = None, user: str = "", cwd: str = "",
        env: Sequence[str] = (), privileged: bool = False, start: bool = True, kept: int = -1,
    ) -> Process:  # fmt: skip
        """Add another process to the container and, unless told not to, start it; `wait` for it, then `delete` it.

        What is not given is the container's own. privileged: with every capability. kept: after so many seconds in
        which nobody has asked how it ended, the node deletes it.
        """
        container = await self.client.container(self.container_id)
        process = await container.process(
            args, user=user, cwd=cwd, env=env, terminal=bool(stdio and stdio.terminal), privileged=privileged
        )
        exec_id = f"exec-{secrets.token_hex(6)}"
        pipes = carrier(self.client, self.container_id, exec_id, stdio or Stdio.null())
        added = Process(self.client, self.container_id, exec_id, pipes)
        try:
            added.carry()
            async with handed(self.client, process) as (given, digest):
                await self.client.tasks.exec(self.container_id, exec_id, given, pipes.paths, digest, kept)
            if start:
                await added.start()
        except BaseException:
            added.detach()
            with contextlib.suppress(WherryError):
                await asyncio.shield(self.client.tasks.delete(self.container_id, exec_id, True))
            raise
        return added

    async def run(self, args: Sequence[str], *, stdin: bytes | None = None, **options: Any) -> Completed:
        """Run a command in the container to its end and answer what it wrote."""
        out, err = Collected(), Collected()
        process = await self.exec(args, stdio=Stdio(stdin, out, err), **{"kept": KEPT_MAX, **options})
        try:
            status = await process.wait()
        finally:
            await process.delete(force=True)
        return Completed(status.code, bytes(out.data), bytes(err.data), out.truncated or err.truncated)

    async def stop(self, signal: int = signals.SIGTERM, patience: float = 10.0) -> ExitStatus:
        """Ask it to end with a signal, and kill it when it has not after `patience` seconds (negative: never).

        A paused one is thawed, for it could not hear. The task stays, stopped.
        """
        with contextlib.suppress(NotFound):  # it has ended meanwhile
            if (await self.state()).status == "paused":
                await self.resume()
            await self.kill(signal)
        if patience >= 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    return await self.wait()
            with contextlib.suppress(NotFound):
                await self.kill(signals.SIGKILL)
        return await self.wait()

    async def stats(self) -> Stats | None:
        """What it has used until now; None when it has ended. Unavailable when it cannot be asked."""
        found = next(iter((await self.client.tasks.stats([self.container_id])).items), None)
        if found is not None and found.error:
            raise Unavailable(f"stats of {self.container_id}: {found.error}")
        return found

    async def update(self, resources: Mapping[str, Any]) -> None:
        """Change its limits (an OCI LinuxResources) while it lives; `Container.update` also remembers them."""
        await self.client.tasks.update(self.container_id, dict(resources))

    async def pause(self) -> None:
        """Freeze it."""
        await self.client.tasks.pause(self.container_id)

    async def resume(self) -> None:
        """Thaw it."""
        await self.client.tasks.resume(self.container_id)

    async def pids(self) -> list[ProcessInfo]:
        """Every pid inside, as the host numbers them."""
        return await self.client.tasks.pids(self.container_id)

    async def __aenter__(self) -> Task:
        return self

    async def __aexit__(self, *exc: object) -> None:
        with contextlib.suppress(NotFound):
            await done(self.delete(force=True))


class NewTask:
    """What `container.new_task` answers: `await` it for a created Task, or enter it with `async with`."""

    def __init__(self, container: Container, stdio: Stdio, mounts: list[Mount] | None, runtime: str) -> None:
        self._container = container
        self._stdio = stdio
        self._mounts = mounts
        self._runtime = runtime
        self._task: Task | None = None

    async def _create(self) -> Task:
        container, client = self._container, self._container.client
        await container.rejoin()
        pipes = carrier(client, container.id, "", self._stdio)
        task = Task(client, container.id, "", pipes)
        try:
            task.carry()
            task.pid = await self._made(pipes.paths)
        except BaseException:
            task.detach()
            raise
        return task

    async def _made(self, paths: Paths) -> int:
        """The pid; where it stays unknown whether there is a task, there is none when this raises."""
        id, tasks = self._container.id, self._container.client.tasks
        mounts = self._mounts if self._mounts is not None else await self._container.first_mounts()
        return await made(lambda: tasks.create(id, mounts, paths, self._runtime), lambda _: tasks.delete(id, "", True))

    def __await__(self) -> Generator[Any, None, Task]:
        return self._create().__await__()

    async def __aenter__(self) -> Task:
        self._task = await self._create()
        return self._task

    async def __aexit__(self, *exc: object) -> None:
        if self._task is None:
            raise FailedPrecondition("the task was never created")
        await self._task.__aexit__(*exc)
