"""A container: metadata, from which a task is made."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from wherry_shared.api.container import Container as Record
from wherry_shared.api.container import Runtime
from wherry_shared.api.diff import Change
from wherry_shared.errors import FailedPrecondition, NotFound, WherryError
from wherry_shared.values import Mount, check_identifier

from . import spec, users
from .spec import Options
from .stdio import Stdio
from .task import NewTask, Task
from .unpack import chain_ids

if TYPE_CHECKING:
    from .client import Client
    from .image import Image, Resolved

STOP_SIGNAL_LABEL = "io.containerd.image.config.stop-signal"
# Which OCI runtime that is, the node decides.
DEFAULT_RUNTIME = "default"
DEFAULT_SNAPSHOTTER = "overlay"
# An image may not set what steers the runtime or the restart monitor (GHSA-xhf5-7wjv-pqxp).
RESERVED_PREFIXES = ("containerd.io/", "io.containerd.", "io.cri-containerd")


class Container:
    """A container in the client's namespace. Make one with `client.new_container` or `client.container`."""

    def __init__(self, client: Client, record: Record) -> None:
        self.client = client
        self.record = record

    def __repr__(self) -> str:
        return f"<Container {self.id}>"

    @property
    def id(self) -> str:
        return self.record.id

    async def mounts(self) -> list[Mount]:
        """The mounts of its snapshot; none without one."""
        if not self.record.snapshot_key:
            return []
        return await self.client.snapshots.mounts(self.record.snapshotter, self.record.snapshot_key)

    def new_task(self, *, stdio: Stdio | None = None, mounts: list[Mount] | None = None, runtime: str = "") -> NewTask:
        """Create its task: `await` it, or `async with` it to have it killed and deleted at the end.

        mounts: instead of its snapshot's. runtime: instead of its own.
        """
        return NewTask(self, stdio or Stdio.null(), mounts, runtime)

    async def task(self) -> Task:
        """Its task, when there is one. NotFound."""
        state = await self.client.tasks.get(self.id)
        task = Task(self.client, self.id, "", None)
        task.pid = state.pid
        return task

    async def process(
        self, args: Sequence[str], *, user: str = "", cwd: str = "", env: Sequence[str] = (), terminal: bool = False
    ) -> dict[str, Any]:
        """The OCI process of a command in this container: its own environment and user, unless told otherwise."""
        own = (self.record.spec or {}).get("process", {})
        who = users.resolve(user, await self.mounts()) if user else None
        made = spec.process(
            args,
            env=spec.environment(None, [*own.get("env", []), *env]),
            cwd=spec.working_directory(None, cwd or own.get("cwd", "/")),
            user=who or spec.User(),
            terminal=terminal,
        )
        if who is None and "user" in own:
            made["user"] = own["user"]
        return made

    async def changes(self) -> list[Change]:
        """What differs from the image that it was made from, in the order of names. FailedPrecondition: no snapshot."""
        from . import commit

        parent = await commit.parent_of(self)
        async with commit.viewed(self.client, self.record.snapshotter, parent) as left:
            return [change async for change in commit.changes(self.client, left, await self.mounts())]

    async def commit(self, name: str, **wish: Any) -> Image:
        """Make an image `name` of the image that it was made from and its changes.

        Options are those of `wherry.commit.Wish`: author, message, changes, compression, pause, unpack.
        """
        from .commit import Commit, Wish

        return await Commit(self, Wish(**wish)).run(name)

    async def delete(self, *, snapshot: bool = False) -> None:
        """Forget it, with `snapshot` its writable snapshot too. FailedPrecondition while it has a task."""
        with contextlib.suppress(NotFound):
            state = await self.client.tasks.get(self.id)
            raise FailedPrecondition(f"container {self.id} has a task that is {state.status}: delete that first")
        if snapshot and self.record.snapshot_key:
            with contextlib.suppress(NotFound):
                await self.client.snapshots.remove(self.record.snapshotter, self.record.snapshot_key)
        await self.client.containers.delete(self.id)


class NewContainer:
    """What `client.new_container` answers: `await` it for a Container, or enter it with `async with`.

    image: whose filesystem, environment and command; unpacked where it is not. snapshot: the key of its new writable
    snapshot (the container's id unless given). runtime: an OCI runtime's name. labels: the container's own.
    Everything else as in `wherry.spec.Options`: args, entrypoint, env, cwd, user, hostname, terminal, read_only,
    host_network, mounts, annotations, resources. spec: a whole OCI specification of the caller's instead.
    """

    def __init__(
        self, client: Client, id: str, image: Image | None = None, *, snapshot: str = "", snapshotter: str = "",
        runtime: str = "", labels: dict[str, str] | None = None, spec: dict[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self._client = client
        self._id = check_identifier(id, "container id")
        self._image = image
        self._snapshot = snapshot or id
        self._snapshotter = snapshotter
        self._runtime = runtime
        self._labels = labels or {}
        self._spec = spec
        self._options = Options(**options)
        self._container: Container | None = None

    async def _create(self) -> Container:
        await self._client.ensure_namespace()
        defaults = {} if self._runtime and self._snapshotter else await self._client.defaults()
        runtime = Runtime(name=self._runtime or defaults.get("runtime", DEFAULT_RUNTIME))
        self._snapshotter = self._snapshotter or defaults.get("snapshotter", DEFAULT_SNAPSHOTTER)
        if self._image is None:
            made = self._spec if self._spec is not None else spec.make(self._id, None, self._options, spec.User())
            record = Record(id=self._id, labels=self._labels, runtime=runtime, spec=made)
            return Container(self._client, await self._client.containers.create(record))
        async with self._client.lease():
            return await self._from_image(self._image, runtime)

    async def _from_image(self, image: Image, runtime: Runtime) -> Container:
        client = self._client
        resolved = await image.resolve()
        snapshotter = self._snapshotter
        mounts = await self._prepare(image, resolved)
        try:
            made = self._spec
            if made is None:
                user = users.resolve(self._options.user or resolved.config.user, mounts)
                made = spec.make(self._id, resolved.config, self._options, user)
            record = Record(
                id=self._id, labels=self._all_labels(resolved), image=image.name, runtime=runtime, spec=made,
                snapshotter=snapshotter, snapshot_key=self._snapshot,
            )  # fmt: skip
            return Container(client, await client.containers.create(record))
        except BaseException:
            with contextlib.suppress(WherryError):
                await client.snapshots.remove(snapshotter, self._snapshot)
            raise

    async def _prepare(self, image: Image, resolved: Resolved) -> list[Mount]:
        """The container's own snapshot on the image's topmost; the image is unpacked first where it is not."""
        chain = chain_ids(resolved.config.diff_ids)
        top, snapshotter = chain[-1] if chain else "", self._snapshotter
        try:
            return await self._client.snapshots.prepare(snapshotter, self._snapshot, top)
        except NotFound:
            await image.unpack(snapshotter)
            return await self._client.snapshots.prepare(snapshotter, self._snapshot, top)

    def _all_labels(self, resolved: Resolved) -> dict[str, str]:
        labels = {k: v for k, v in resolved.config.labels.items() if not k.startswith(RESERVED_PREFIXES)}
        if resolved.config.stop_signal:
            labels[STOP_SIGNAL_LABEL] = resolved.config.stop_signal
        return {**labels, **self._labels}

    def __await__(self) -> Generator[Any, None, Container]:
        return self._create().__await__()

    async def __aenter__(self) -> Container:
        self._container = await self._create()
        return self._container

    async def __aexit__(self, *exc: object) -> None:
        if self._container is not None:
            with contextlib.suppress(NotFound):
                await self._container.delete(snapshot=True)
