"""Which directories containers write their root filesystems to, and that nobody else does where it counts.

A runtime makes a container's mounts one after the other, and hides and protects what is in /proc by its paths. Another
container that has the same directory as its root can move the mounted /proc out of the way in between: what is then
hidden and protected is somewhere else, and the kernel's settings, core_pattern among them, are the first one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wherry_shared.errors import FailedPrecondition
from wherry_shared.values import Mount

from .tasks import Task


def written(mounts: Sequence[Mount]) -> str:
    """The directory that what is written to a root filesystem goes to; "": none that is known."""
    if not mounts:
        return ""
    last = mounts[-1]
    if last.type == "bind":
        return "" if "ro" in last.options else last.source
    return next((option.partition("=")[2] for option in last.options if option.startswith("upperdir=")), "")


def check(mounts: Sequence[Mount], tasks: Iterable[Task], creating: Iterable[str]) -> None:
    """FailedPrecondition: a task that has not ended, or one in the making, writes to what these mounts show."""
    shown = {directory for mount in mounts for directory in _shown(mount)}
    for task in tasks:
        if task.row.root in shown and task.process("").row.exit_status is None:
            raise FailedPrecondition(f"the root filesystem is in use: task {task.row.container} writes to it")
    if not shown.isdisjoint(creating):
        raise FailedPrecondition("the root filesystem is in use: another task is being created with it")


def _shown(mount: Mount) -> list[str]:
    if mount.type == "bind":
        return [mount.source]
    given = [option.partition("=") for option in mount.options]
    return [path for key, _, paths in given if key in ("upperdir", "lowerdir") for path in paths.split(":") if path]
