"""A container: metadata, from which a task is made."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from wherry_shared.api.container import JOIN_LABEL, Runtime
from wherry_shared.api.container import Container as Record
from wherry_shared.api.diff import Change
from wherry_shared.api.snapshot import GID_LABEL, UID_LABEL
from wherry_shared.api.task import LOG_LABEL
from wherry_shared.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    WherryError,
)
from wherry_shared.values import LABEL_MAX, Mount, Platform, check_identifier, check_labels

from . import capabilities, limits, restarts, spec, users
from .logs import LogLine, logs
from .registry.platforms import describe, parse_platform
from .spec import Options
from .stdio import Stdio
from .task import NewTask, Task
from .undo import done, made
from .unpack import chain_ids

if TYPE_CHECKING:
    from .client import Client
    from .image import Image, Resolved

STOP_SIGNAL_LABEL = "io.containerd.image.config.stop-signal"
# Which OCI runtime that is, the node decides.
DEFAULT_RUNTIME = "default"
DEFAULT_SNAPSHOTTER = "overlay"
# What a container is called beside its id, which never changes.
NAME_LABEL = "wherry/name"
# Whose of the image's it is, where that was said: `os/architecture[/variant]`.
PLATFORM_LABEL = "wherry/platform"
_NAMESPACE_FILES = {"network": "net"}
# An image may not set what steers the runtime or the restart monitor (GHSA-xhf5-7wjv-pqxp).
RESERVED_PREFIXES = ("containerd.io/", "io.containerd.", "io.cri-containerd", "wherry/")

log = logging.getLogger(__name__)


async def find(client: Client, name: str) -> Container:
    """A container by its id, or by the name that `rename` gave it.

    NotFound. FailedPrecondition: several have this name, and none this id.
    """
    with contextlib.suppress(NotFound, InvalidArgument):
        return Container(client, await client.containers.get(name))
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    named = (await client.containers.walk([f'labels."{NAME_LABEL}"=="{quoted}"'], limit=2)).items
    if len(named) > 1:
        raise FailedPrecondition(f"{len(named)} containers are named {name!r}: use their ids")
    if not named:
        raise NotFound(f"container {name!r}: not found")
    return Container(client, named[0])


async def check_free(client: Client, name: str) -> None:
    """AlreadyExists: a container has this id, or is called so. Two who look at once may both find it free."""
    with contextlib.suppress(NotFound):
        other = await find(client, name)
        raise AlreadyExists(f"the name {name!r} is taken by container {other.id}: remove or rename that one first")


async def namespace_of(client: Client, name: str, kind: str) -> str:
    """The path of another container's namespace on the node. NotFound; FailedPrecondition: it does not run."""
    other = await find(client, name)
    try:
        state = await client.tasks.get(other.id)
    except NotFound:
        raise FailedPrecondition(f"the {kind} namespace of container {name}: it does not run") from None
    if state.status not in ("created", "running", "paused"):
        raise FailedPrecondition(f"the {kind} namespace of container {name}: it is {state.status}")
    return f"/proc/{state.pid}/ns/{_NAMESPACE_FILES.get(kind, kind)}"


_OF_EVERY_PROCESS = ("user", "capabilities", "rlimits", "noNewPrivileges", "apparmorProfile", "selinuxLabel")


class Container:
    """A container in the client's namespace. Make one with `client.new_container` or `client.container`."""

    def __init__(self, client: Client, record: Record) -> None:
        self.client = client
        self.record = record
        self._prepared: list[Mount] | None = None

    def __repr__(self) -> str:
        return f"<Container {self.id}>"

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def name(self) -> str:
        """What `rename` called it, else its id."""
        return self.record.labels.get(NAME_LABEL) or self.id

    @property
    def platform(self) -> Platform | None:
        """Which of the image's platforms it was made for; None: the node's."""
        text = self.record.labels.get(PLATFORM_LABEL, "")
        return parse_platform(text) if text else None

    async def rename(self, name: str) -> None:
        """Give it a name beside its id; its own id takes the name away.

        The id stays: tasks, cgroups, logs and events of a container carry it. AlreadyExists: another one has the name
        or id; two renames at once may both find it free.
        """
        check_identifier(name, "container name")
        if name != self.id and name != self.name:
            await check_free(self.client, name)
        await self.label({NAME_LABEL: "" if name == self.id else name})

    async def label(self, labels: Mapping[str, str]) -> None:
        """Set some of its labels; an empty value takes one out."""
        new = self.record.model_copy(update={"labels": dict(labels)})
        self.record = await self.client.containers.update(new, [f"labels.{key}" for key in labels])

    async def update(self, resources: Mapping[str, Any]) -> None:
        """Change limits (an OCI LinuxResources): of its task, when it has one that has not ended, and of those to come.

        Nothing is recorded when the runtime refuses.
        """
        if resources.get("devices"):
            raise InvalidArgument("the devices of a container do not change")
        with contextlib.suppress(NotFound):
            state = await self.client.tasks.get(self.id)
            if state.status != "stopped":
                await self.client.tasks.update(self.id, dict(resources))
        made = dict(self.record.spec or {})
        linux = dict(made.get("linux") or {})
        linux["resources"] = limits.merged(linux.get("resources") or {}, dict(resources))
        made["linux"] = linux
        await self._change_spec(made)

    async def _change_spec(self, made: dict[str, Any]) -> None:
        new = self.record.model_copy(update={"spec": made})
        self.record = await self.client.containers.update(new, ["spec"])

    async def rejoin(self) -> None:
        """Point its specification at the namespaces that the containers which it shares them with have now.

        FailedPrecondition: one of those does not run.
        """
        shared = {
            key.removeprefix(JOIN_LABEL): other
            for key, other in self.record.labels.items() if key.startswith(JOIN_LABEL)
        }  # fmt: skip
        if not shared or not self.record.spec:
            return
        paths = {kind: await namespace_of(self.client, other, kind) for kind, other in shared.items()}
        linux = self.record.spec.get("linux") or {}
        namespaces = [
            {**each, "path": paths[each["type"]]} if each["type"] in paths else each
            for each in linux.get("namespaces") or ()
        ]
        if namespaces != linux.get("namespaces"):
            await self._change_spec({**self.record.spec, "linux": {**linux, "namespaces": namespaces}})

    async def mounts(self) -> list[Mount]:
        """The mounts of its snapshot; none without one."""
        if not self.record.snapshot_key:
            return []
        return await self.client.snapshots.mounts(self.record.snapshotter, self.record.snapshot_key)

    async def first_mounts(self) -> list[Mount]:
        """The same; for the first task of a container that was just made they are known without asking."""
        prepared, self._prepared = self._prepared, None
        return prepared if prepared is not None else await self.mounts()

    def new_task(self, *, stdio: Stdio | None = None, mounts: list[Mount] | None = None, runtime: str = "") -> NewTask:
        """Create its task: `await` it, or `async with` it to have it killed and deleted at the end.

        mounts: instead of its snapshot's. runtime: instead of its own.
        """
        return NewTask(self, stdio or Stdio.null(), mounts, runtime)

    def logs(
        self, *, follow: bool = False, since: datetime | None = None, until: datetime | None = None, tail: int = -1
    ) -> AsyncIterator[LogLine]:
        """What it wrote while it was logged (`Stdio.logged`), the oldest line first; all of it, or the last `tail`.

        follow: go on until the container ends. FailedPrecondition: it keeps no log.
        """
        return logs(self.client, self.id, follow=follow, since=since, until=until, tail=tail)

    async def start(self, *, stdin: bool | None = None, again: int = 0) -> None:
        """Run it in the background, its output logged; one that runs is left as it is, what is left of one that has
        ended is removed. When it does not start, no task is left. FailedPrecondition: it is paused.

        stdin: whether it stays open for who attaches; unless said, it does for a terminal. again: how often its policy
        has made it start since somebody did.
        """
        if changes := restarts.on_start(self.record.labels, again):
            await self.label(changes)
        with contextlib.suppress(NotFound):
            status = (await self.client.tasks.get(self.id)).status
            if status == "created":
                await self.client.tasks.start(self.id)
            if status == "paused":
                raise FailedPrecondition(f"cannot start a paused container: unpause {self.id}")
            if status != "stopped":
                return
            await self.client.tasks.delete(self.id)
        terminal = bool(((self.record.spec or {}).get("process") or {}).get("terminal"))
        options = self.record.labels.get(LOG_LABEL, "")
        stdio = Stdio.logged(stdin=terminal if stdin is None else stdin, terminal=terminal, options=options)
        task = await self.new_task(stdio=stdio)
        try:
            await task.start()
        except BaseException:
            with contextlib.suppress(WherryError):
                await asyncio.shield(task.delete(force=True))
            raise
        task.detach()

    async def keep(self, policy: str) -> None:
        """Give it another restart policy, which holds at once where it runs: `no`, `always`, `unless-stopped` or
        `on-failure[:N]`. InvalidArgument."""
        changes = restarts.labels_for(policy)
        with contextlib.suppress(NotFound):
            if (await self.client.tasks.get(self.id)).status != "stopped":
                changes |= restarts.on_start({**self.record.labels, **changes})
        await self.label(changes)

    async def leave_stopped(self) -> None:
        """Its restart policy is not to start it again once it ends."""
        if changes := restarts.on_stop(self.record.labels):
            await self.label(changes)

    async def task(self) -> Task:
        """Its task, when there is one. NotFound."""
        state = await self.client.tasks.get(self.id)
        task = Task(self.client, self.id, "", None)
        task.pid = state.pid
        return task

    async def process(
        self, args: Sequence[str], *, user: str = "", cwd: str = "", env: Sequence[str] = (), terminal: bool = False,
        privileged: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """The OCI process of a command in this container: with its own environment, user, capabilities and limits,
        unless told otherwise. privileged: every capability, for admins."""
        own = (self.record.spec or {}).get("process") or {}
        if not args:
            raise InvalidArgument("nothing to run: no command is given")
        made = {
            **spec.process(args, env=(), cwd="", user=spec.User()),
            **{key: own[key] for key in _OF_EVERY_PROCESS if key in own},
            "env": spec.environment(None, [*own.get("env", []), *(["TERM=xterm"] if terminal else []), *env]),
            "cwd": spec.working_directory(None, cwd or own.get("cwd", "/")),
            "terminal": terminal,
        }
        if user:
            who = users.resolve(user, await self.mounts())
            made["user"] = {"uid": who.uid, "gid": who.gid, "additionalGids": list(who.additional_gids)}
        if privileged:
            every = capabilities.every()
            made["capabilities"] = {"bounding": every, "effective": every, "permitted": every}
            made["noNewPrivileges"] = False
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
        await self.forget(snapshot=snapshot)

    async def forget(self, *, snapshot: bool = False) -> None:
        """`delete` for one whose task the caller has just deleted: nobody is asked whether it has one."""
        if snapshot and self.record.snapshot_key:
            with contextlib.suppress(NotFound):
                await self.client.snapshots.remove(self.record.snapshotter, self.record.snapshot_key)
        await self.client.containers.delete(self.id)


class NewContainer:
    """What `client.new_container` answers: `await` it for a Container, or enter it with `async with`.

    image: whose filesystem, environment and command; unpacked where it is not. platform: which of the image's, the
    node's own unless given. snapshot: the key of its new writable
    snapshot (the container's id unless given). runtime: an OCI runtime's name. labels: the container's own.
    join: containers whose namespaces it shares, by kind (`wherry.spec.KINDS`). Everything else as in
    `wherry.spec.Options`. spec: a whole OCI specification of the caller's instead.
    """

    def __init__(
        self, client: Client, id: str, image: Image | None = None, *, platform: Platform | None = None,
        snapshot: str = "", snapshotter: str = "", runtime: str = "", labels: dict[str, str] | None = None,
        join: Mapping[str, str] | None = None, spec: dict[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self._client = client
        self._id = check_identifier(id, "container id")
        self._image = image
        self._platform = platform
        self._snapshot = snapshot or id
        self._snapshotter = snapshotter
        self._runtime = runtime
        self._labels = check_labels(labels or {})
        self._join = dict(join or {})
        self._spec = spec
        self._options = Options(**options)
        self._container: Container | None = None

    async def _joined(self) -> None:
        """Find the namespaces that are to be shared."""
        paths = {kind: await namespace_of(self._client, other, kind) for kind, other in self._join.items()}
        self._options = replace(self._options, namespaces={**self._options.namespaces, **paths})
        self._labels = {**self._labels, **{JOIN_LABEL + kind: other for kind, other in self._join.items()}}

    async def _ground(self) -> dict[str, str]:
        """The defaults of a namespace that is known."""
        await self._client.ensure_namespace()
        return {} if self._runtime and self._snapshotter else await self._client.defaults()

    async def _create(self) -> Container:
        if self._image is None:
            defaults = await self._ground()
        else:  # what the image says is read meanwhile, and the image remembers it
            defaults, _ = await asyncio.gather(self._ground(), self._image.resolve(self._platform))
        if self._join:
            await self._joined()
        runtime = Runtime(name=self._runtime or defaults.get("runtime", DEFAULT_RUNTIME))
        self._snapshotter = self._snapshotter or defaults.get("snapshotter", DEFAULT_SNAPSHOTTER)
        if self._image is None:
            user = users.resolve(self._options.user, [], self._options.groups)
            made = self._spec if self._spec is not None else spec.make(self._id, None, self._options, user)
            stop = {STOP_SIGNAL_LABEL: self._options.stop_signal} if self._options.stop_signal else {}
            record = Record(id=self._id, labels={**stop, **self._labels}, runtime=runtime, spec=made)
            return await self._recorded(record)
        container = None
        try:
            async with self._client.lease():
                container = await self._from_image(self._image, runtime)
            return container
        except BaseException:  # also of the lease's end
            if container is not None:
                with contextlib.suppress(WherryError):
                    await container.forget(snapshot=True)
            raise

    async def _from_image(self, image: Image, runtime: Runtime) -> Container:
        client = self._client
        resolved = await image.resolve(self._platform)
        snapshotter = self._snapshotter
        mounts = await self._prepare(image, resolved)
        try:
            specification = self._spec
            if specification is None:
                user = users.resolve(self._options.user or resolved.config.user, mounts, self._options.groups)
                specification = spec.make(self._id, resolved.config, self._options, user)
            record = Record(
                id=self._id, labels=self._all_labels(resolved), image=image.name, runtime=runtime, spec=specification,
                snapshotter=snapshotter, snapshot_key=self._snapshot,
            )  # fmt: skip
            container = await self._recorded(record)
            container._prepared = mounts
            return container
        except BaseException:
            with contextlib.suppress(WherryError):
                await client.snapshots.remove(snapshotter, self._snapshot)
            raise

    async def _recorded(self, record: Record) -> Container:
        containers = self._client.containers
        return Container(
            self._client, await made(lambda: containers.create(record), lambda _: containers.delete(record.id))
        )

    async def _prepare(self, image: Image, resolved: Resolved) -> list[Mount]:
        """The container's own snapshot on the image's topmost; the image is unpacked first where it is not."""
        chain = chain_ids(resolved.config.diff_ids)
        top, snapshotter, key = chain[-1] if chain else "", self._snapshotter, self._snapshot
        snapshots, labels = self._client.snapshots, _map_labels(self._options)

        async def prepared() -> list[Mount]:
            return await made(
                lambda: snapshots.prepare(snapshotter, key, top, labels), lambda _: snapshots.remove(snapshotter, key)
            )

        try:
            return await prepared()
        except NotFound:
            await image.unpack(snapshotter, self._platform)
            return await prepared()

    def _all_labels(self, resolved: Resolved) -> dict[str, str]:
        labels = image_labels(resolved.config.labels)
        if signal := self._options.stop_signal or resolved.config.stop_signal:
            labels[STOP_SIGNAL_LABEL] = signal
        if self._platform is not None:
            labels[PLATFORM_LABEL] = describe(self._platform)
        return {**labels, **self._labels}

    def __await__(self) -> Generator[Any, None, Container]:
        return self._create().__await__()

    async def __aenter__(self) -> Container:
        self._container = await self._create()
        return self._container

    async def __aexit__(self, *exc: object) -> None:
        if self._container is not None:
            with contextlib.suppress(NotFound):
                await done(self._container.delete(snapshot=True))


def image_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """What of an image's labels a container may have; what is reserved, or too long, is dropped with a warning."""
    kept = {}
    for key, value in labels.items():
        if key.startswith(RESERVED_PREFIXES):
            log.warning("the image's label %r is dropped: its prefix is reserved", key[:80])
        elif not key or len(key.encode()) + len(value.encode()) > LABEL_MAX:
            log.warning("the image's label %r is dropped: it is empty or longer than %d bytes", key[:80], LABEL_MAX)
        else:
            kept[key] = value
    return kept


def _map_labels(options: Options) -> dict[str, str]:
    """The labels by which the snapshotter maps the ids of what lies below the container."""
    if not options.uid_mappings:
        return {}
    maps = ((UID_LABEL, options.uid_mappings), (GID_LABEL, options.gid_mappings))
    return {label: ",".join(f"{inside}:{outside}:{size}" for inside, outside, size in ranges) for label, ranges in maps}
