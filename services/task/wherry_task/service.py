"""The edge of the task service: who asks, for which container, with which rights."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any

from wherry_shared import context
from wherry_shared.api.container import Containers
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.api.task import (
    KEPT_MAX,
    REMOVE_LABEL,
    REMOVE_VALUES,
    CheckpointOptions,
    Exit,
    LogWindow,
    Output,
    Process,
    ProcessInfo,
    Stats,
    Stdio,
    Taken,
    Tasks,
)
from wherry_shared.context import Identity
from wherry_shared.contract import immediate
from wherry_shared.errors import AlreadyExists, InvalidArgument, NotFound
from wherry_shared.values import Descriptor, Mount, Page

from . import admission, runtimes
from .backends import Creation
from .checkpoints import Checkpoints
from .lingering import Lingering
from .processes import Processes, check_arguments
from .removals import Removals, born_of
from .stdio import rights
from .supervisor import Supervisor


class TaskService(Tasks):
    """Serves the supervisor."""

    def __init__(
        self, supervisor: Supervisor, containers: Containers, snapshots: Snapshots, state: Path,
        checkpoints: Checkpoints, processes: Processes, allowed: Collection[str], loggers: Collection[str] = (),
        removals: Removals | None = None, lingering: Lingering | None = None,
    ) -> None:  # fmt: skip
        self._supervisor = supervisor
        self._containers = containers
        self._snapshots = snapshots
        self._state = state
        self._checkpoints = checkpoints
        self._processes = processes
        self._allowed = allowed
        self._loggers = loggers
        self._removals = removals
        self._lingering = lingering or Lingering(supervisor)

    async def create(
        self, container_id: str, mounts: list[Mount] = [], stdio: Stdio = Stdio(), runtime: str = "",
        checkpoint: str = "",
    ) -> int:  # fmt: skip
        namespace, identity = context.namespace(), context.current().identity
        self._supervisor.once()
        rights.check(identity, namespace, stdio, self._state, self._loggers)
        admission.check_checkpoint(identity, checkpoint)
        self._supervisor.expect()
        container = await self._containers.get(container_id)
        if container.spec is None:
            raise InvalidArgument(f"container {container_id} has no runtime specification")
        judged = admission.judged(identity, container)
        rights.check_logs(judged, stdio)
        binary = runtimes.find(runtime or container.runtime.name, self._allowed if judged.is_admin else ())
        admission.check_options(judged, container.runtime.options, self._allowed)
        if not judged.is_admin:
            admission.check_spec(judged, container.spec)
            own = await self._snapshots.mounts(container.snapshotter, container.snapshot_key)
            admission.check_mounts(judged, mounts, own)
        check_arguments(container.spec.get("process"))
        restore = await self._image_of(namespace, container_id, checkpoint)
        creation = Creation(mounts, stdio, restore=restore, options=container.runtime.options)
        removal = born_of(container) if container.labels.get(REMOVE_LABEL) in REMOVE_VALUES else ""
        try:
            pid = await self._supervisor.create(
                namespace, container_id, container.spec, binary, creation, container.created_at, removal=removal,
                alone=not judged.is_admin,
            )  # fmt: skip
        except BaseException:
            if restore != checkpoint:
                await self._checkpoints.forget(namespace, container_id)
            raise
        if removal and self._removals is not None:
            self._removals.expect(namespace, container_id, removal)
        return pid

    async def _image_of(self, namespace: str, container_id: str, checkpoint: str) -> str:
        """A path on the node for what a task is to be restored from; "" for nothing."""
        if not checkpoint or checkpoint.startswith("/"):
            return checkpoint
        if self._supervisor.has(namespace, container_id):
            raise AlreadyExists(f"task {container_id} exists")  # and its own image stays where it is
        return str(await self._checkpoints.fetch(namespace, container_id, checkpoint))

    async def start(self, container_id: str, exec_id: str = "") -> int:
        self._supervisor.once()
        pid = await self._supervisor.start(context.namespace(), container_id, exec_id)
        if not exec_id:
            await self._checkpoints.forget(context.namespace(), container_id)
        return pid

    async def delete(self, container_id: str, exec_id: str = "", force: bool = False) -> Exit:
        self._supervisor.once()
        exit = await self._supervisor.delete(context.namespace(), container_id, exec_id, force=force)
        if not exec_id:
            await self._checkpoints.forget(context.namespace(), container_id)
        return exit

    @immediate
    async def get(self, container_id: str, exec_id: str = "") -> Process:
        return self._supervisor.get(context.namespace(), container_id, exec_id)

    async def walk(self, after: str = "", limit: int = 1000) -> Page[Process]:
        return self._supervisor.walk(context.namespace(), after, limit)

    async def kill(self, container_id: str, signal: int, exec_id: str = "", all: bool = False) -> None:
        await self._supervisor.kill(context.namespace(), container_id, signal, exec_id, all=all)

    async def update(
        self, container_id: str, resources: dict[str, Any], annotations: dict[str, str] = {}
    ) -> None:  # fmt: skip
        self._supervisor.once()
        admission.check_resources(context.current().identity, resources)
        admission.check_annotations(context.current().identity, annotations)
        await self._supervisor.update(context.namespace(), container_id, resources, annotations)

    async def stats(self, container_ids: list[str] = [], after: str = "", limit: int = 1000) -> Page[Stats]:
        return await self._supervisor.stats(context.namespace(), container_ids, after, limit)

    async def checkpoint(
        self, container_id: str, options: CheckpointOptions = CheckpointOptions()
    ) -> list[Descriptor]:  # fmt: skip
        self._supervisor.once()
        self._supervisor.task(context.namespace(), container_id)
        admission.check_checkpoint(context.current().identity, options.image, options.work)
        if options.image:
            return await self._supervisor.checkpoint(context.namespace(), container_id, options)
        container = await self._containers.get(container_id)
        room = self._checkpoints.room()
        inside = options.model_copy(update={"image": str(room / "image")})

        async def keep() -> list[Descriptor]:
            return await self._checkpoints.keep(room, container.spec or {})

        try:
            return await self._supervisor.checkpoint(context.namespace(), container_id, inside, keep)
        finally:
            await self._checkpoints.leave(room)

    async def exec(
        self, container_id: str, exec_id: str, process: dict[str, Any], stdio: Stdio = Stdio(), digest: str = "",
        kept: int = -1,
    ) -> None:  # fmt: skip
        namespace, identity = context.namespace(), context.current().identity
        self._supervisor.once()
        rights.check(identity, namespace, stdio, self._state, self._loggers)
        if digest:
            self._supervisor.task(namespace, container_id)
        async with self._processes.given(process, digest) as given:
            await self._check_process(identity, container_id, given)
            check_arguments(given)
            await self._supervisor.exec(namespace, container_id, exec_id, given, stdio, kept=min(kept, KEPT_MAX))
            self._lingering.expect(namespace, container_id, exec_id)

    async def _check_process(self, identity: Identity, container_id: str, process: dict[str, Any]) -> None:
        """What an admin runs in a tenant's container is the tenant's program, and may be what the tenant wrote down."""
        if identity.is_admin and admission.asks_more(process):
            container = await self._containers.get(container_id)
            identity = admission.judged(identity, container)
        admission.check_process(identity, process)

    async def pause(self, container_id: str, hold: str = "") -> None:
        self._supervisor.once()
        await self._supervisor.pause(context.namespace(), container_id, hold)

    async def resume(self, container_id: str, hold: str = "") -> None:
        self._supervisor.once()
        await self._supervisor.resume(context.namespace(), container_id, hold)

    async def pids(self, container_id: str) -> list[ProcessInfo]:
        return await self._supervisor.pids(context.namespace(), container_id)

    async def resize(self, container_id: str, width: int, height: int, exec_id: str = "") -> None:
        await self._supervisor.resize(context.namespace(), container_id, width, height, exec_id)

    async def close_stdin(self, container_id: str, exec_id: str = "") -> None:
        await self._supervisor.close_stdin(context.namespace(), container_id, exec_id)

    async def wait(self, container_id: str, exec_id: str = "", patience: float = 5.0) -> Exit | None:
        return await self._supervisor.wait(context.namespace(), container_id, exec_id, patience)

    async def output(
        self, container_id: str, exec_id: str = "", after: str = "", patience: float = 5.0
    ) -> Output:  # fmt: skip
        return await self._supervisor.streams.output((context.namespace(), container_id, exec_id), after, patience)

    async def input(
        self, container_id: str, writer: str, offset: int, data: bytes = b"", exec_id: str = "",
        eof: bool = False, patience: float = 5.0,
    ) -> Taken:  # fmt: skip
        return await self._supervisor.input(
            context.namespace(), container_id, writer, offset, data, exec_id, eof=eof, patience=patience
        )

    async def logs(
        self, container_id: str, after: str = "", since: datetime | None = None, until: datetime | None = None,
        tail: int = -1, patience: float = 0.0,
    ) -> LogWindow:  # fmt: skip
        streams, namespace = self._supervisor.streams, context.namespace()
        try:
            # A log is its container's, and not that of an earlier one of the same name.
            born = (await self._containers.get(container_id)).created_at
        except NotFound:
            if not after:
                raise
            # It went with its task under somebody who follows: the rest is still there for a moment.
            born = streams.shelf.born(namespace, container_id)
        return await streams.logs(namespace, container_id, born, after, since, until, tail, patience)

    async def sweep_logs(self) -> int:
        """Remove the logs of containers that are gone; answers how many went."""

        async def born(namespace: str, container: str) -> datetime | None:
            with context.use(namespace=namespace):
                return (await self._containers.get(container)).created_at

        return await self._supervisor.streams.shelf.sweep(self._supervisor.has, born)
