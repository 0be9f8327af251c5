"""The port to what runs a container: a Launcher makes a Shim per container, and finds those that outlived us."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from wherry_shared.api.task import Stdio
from wherry_shared.values import Mount


@dataclass(frozen=True)
class Bundle:
    """Where a container's files lie, and what runs it. root: the runtime's own state directory."""

    path: Path
    container: str
    binary: str
    root: Path


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


Notice = Ended | OutOfMemory
OnNotice = Callable[[Notice], None]


class Shim(Protocol):
    """What stands by one container. Its methods raise the errors of wherry_shared, `Unavailable` when it is gone."""

    @property
    def cgroups(self) -> dict[str, str]:
        """Controller to path of the container's cgroups ("" for v2)."""
        ...

    async def create(self, mounts: list[Mount], stdio: Stdio, *, has_poststart: bool) -> int: ...
    async def start(self) -> int: ...
    async def exec(self, exec_id: str, spec: str, stdio: Stdio) -> int: ...
    async def kill(self, signal: int, exec_id: str, *, all: bool) -> None: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def resize(self, width: int, height: int, exec_id: str) -> None: ...
    async def close_stdin(self, exec_id: str) -> None: ...
    async def state(self) -> dict[str, Any]: ...
    async def delete(self, exec_id: str, *, force: bool) -> None: ...

    async def watch(self, on_notice: OnNotice, on_gone: Callable[[], None]) -> None:
        """Tell every end, also those from before; `on_gone` once when the shim has died."""
        ...

    async def close(self) -> None:
        """Let go; the container goes on."""
        ...


class Launcher(Protocol):
    """Makes shims."""

    async def launch(self, bundle: Bundle) -> Shim:
        """A shim for a new bundle."""
        ...

    async def adopt(self, bundle: Bundle) -> Shim | None:
        """The living shim of a bundle; None when it is gone."""
        ...

    async def clean(self, bundle: Bundle) -> list[Ended]:
        """After a shim that died: kill and remove what is left of its container; answers every end on record."""
        ...

    async def close(self, *, idle: bool) -> None:
        """At the service's end; `idle`: no container is left, and nothing else need stay either."""
        ...
