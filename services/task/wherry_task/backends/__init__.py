"""The port to what runs a container: a Launcher makes a Shim per container, and finds those that outlived us."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from wherry_shared.api.task import CheckpointOptions, MetricsV1, MetricsV2, Stdio
from wherry_shared.values import Mount

Metrics = MetricsV1 | MetricsV2


@dataclass(frozen=True)
class Bundle:
    """Where a container's files lie, and what runs it. root: the runtime's own state directory."""

    path: Path
    container: str
    binary: str
    root: Path
    namespace: str = ""


@dataclass(frozen=True)
class Creation:
    """What a container is made of beside its bundle.

    poststart: the spec has such hooks, which only the runtime's own `start` runs. plain: removing it takes nothing but
    its cgroups and the runtime's state. restore: the path of a CRIU image. options: of the runtime, the container's.
    """

    mounts: list[Mount]
    stdio: Stdio
    poststart: bool = False
    plain: bool = False
    restore: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """A process has ended; exec_id "" is the init. exited_ns: unix time in nanoseconds."""

    exec_id: str
    pid: int
    exit_status: int
    exited_ns: int
    oom: bool = False
    shim_died: bool = False


@dataclass(frozen=True)
class OutOfMemory:
    """The kernel killed a process of the container for want of memory."""


@dataclass(frozen=True)
class Seen:
    """What a shim knows of its container: whether the init runs, its pid, its execs' pids, whether it is paused."""

    running: bool
    pid: int
    execs: dict[str, int] = field(default_factory=dict)
    paused: bool = False


Notice = Ended | OutOfMemory
OnNotice = Callable[[Notice], None]


class Shim(Protocol):
    """What stands by one container. Its methods raise the errors of wherry_shared: `Unavailable` when it is gone, or
    does not answer in time."""

    async def start(self) -> int: ...
    async def exec(self, exec_id: str, spec: str, stdio: Stdio) -> int: ...

    async def kill(self, signal: int, exec_id: str, *, all: bool, key: str = "") -> None:
        """Send a signal; once for each key, of the last few, also if another process of the service has sent it."""
        ...

    async def has_sent(self, exec_id: str, key: str) -> bool:
        """Whether a signal of this key was sent to a process that has ended."""
        ...

    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def resize(self, width: int, height: int, exec_id: str) -> None: ...
    async def close_stdin(self, exec_id: str) -> None: ...
    async def update(self, resources: dict[str, Any], annotations: dict[str, str]) -> None: ...
    async def checkpoint(self, options: CheckpointOptions) -> None: ...
    async def delete(self, exec_id: str, *, force: bool) -> None: ...

    def removed(self) -> bool:
        """Of a container that has ended: whether all that a deletion could fail at is behind it. False: not known."""
        ...

    async def pids(self) -> list[int]:
        """Every pid in the container, as the host numbers them."""
        ...

    async def stats(self) -> Metrics | None:
        """What its cgroups count; None without a cgroup of its own."""
        ...

    async def state(self, execs: Sequence[str] = ()) -> Seen:
        """What runs; of these execs, at least."""
        ...

    async def watch(self, on_notice: OnNotice, on_gone: Callable[[], None], execs: Sequence[str] = ()) -> None:
        """Tell every end, also those from before, of the init and of these execs that run, and of every exec to come;
        `on_gone` once when the shim has died."""
        ...

    async def close(self) -> None:
        """Let go; the container goes on."""
        ...


class Launcher(Protocol):
    """Makes shims."""

    async def launch(self, bundle: Bundle, creation: Creation) -> tuple[Shim, int]:
        """Make the container of a new bundle; answers what stands by it and the init's pid, 0 when it is to be
        restored."""
        ...

    async def adopt(self, bundle: Bundle) -> Shim | None:
        """The living shim of a bundle; None when it is gone. Unavailable: it is there and does not answer."""
        ...

    async def clean(self, bundle: Bundle, *, kill: bool = False) -> list[Ended]:
        """After a shim that died: kill and remove what is left of its container; answers every end on record.

        kill: the shim is to be killed first, for it does not answer. AlreadyExists: it lives.
        """
        ...

    def quicken(self) -> None:
        """A process is to be started soon: what can be warmed up for that may be."""
        ...

    async def close(self, *, idle: bool) -> None:
        """At the service's end; `idle`: no container is left, and nothing else need stay either."""
        ...


class Launchers:
    """The launcher that fits a bundle's binary: shim v2 binaries speak for themselves, all others are OCI runtimes."""

    def __init__(self, oci: Launcher, shims: Launcher) -> None:
        self._oci = oci
        self._shims = shims

    def _of(self, bundle: Bundle) -> Launcher:
        return self._shims if is_shim(bundle.binary) else self._oci

    async def launch(self, bundle: Bundle, creation: Creation) -> tuple[Shim, int]:
        return await self._of(bundle).launch(bundle, creation)

    async def adopt(self, bundle: Bundle) -> Shim | None:
        return await self._of(bundle).adopt(bundle)

    async def clean(self, bundle: Bundle, *, kill: bool = False) -> list[Ended]:
        return await self._of(bundle).clean(bundle, kill=kill)

    def quicken(self) -> None:
        self._oci.quicken()

    async def close(self, *, idle: bool) -> None:
        await self._shims.close(idle=idle)
        await self._oci.close(idle=idle)


def is_shim(binary: str) -> bool:
    """Whether a binary is a shim v2 rather than an OCI runtime, by containerd's rule of naming."""
    return Path(binary).name.startswith("containerd-shim-")
