"""Devices of the host for a container: the nodes that are made in it, and the rules of its device cgroup."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherry_shared.errors import InvalidArgument, NotFound

NODES_MAX = 1024
_ACCESS = re.compile(r"(?!.*(.).*\1)[rwm]{1,3}\Z")
# What each container has of its own, or what another mount shows.
_NOT_THE_HOSTS = frozenset(("console", "fd", "mqueue", "ptmx", "pts", "shm"))
NOTHING = {"allow": False, "access": "rwm"}
EVERYTHING = {"allow": True, "access": "rwm"}


@dataclass(frozen=True)
class Device:
    """A device node: its path in the container, what it is, and what of r, w and m (mknod) is allowed."""

    path: str
    type: str
    major: int
    minor: int
    file_mode: int = 0o660
    uid: int = 0
    gid: int = 0
    access: str = "rwm"

    def node(self) -> dict[str, Any]:
        """An entry of the OCI `linux.devices`."""
        return {
            "path": self.path, "type": self.type, "major": self.major, "minor": self.minor,
            "fileMode": self.file_mode, "uid": self.uid, "gid": self.gid,
        }  # fmt: skip

    def rule(self) -> dict[str, Any]:
        """An entry of the OCI `linux.resources.devices`."""
        return {"allow": True, "type": self.type, "major": self.major, "minor": self.minor, "access": self.access}


def parse(text: str) -> list[Device]:
    """The devices of `HOST[:CONTAINER][:rwm]`, looked up on this host; a directory stands for all that are in it.

    InvalidArgument: the text is nonsense, or no device. NotFound: there is no such path.
    """
    source, *rest = text.split(":")
    access = rest.pop() if rest and not rest[-1].startswith("/") else "rwm"
    target = rest.pop() if rest else source
    if rest or not _ACCESS.match(access):
        raise InvalidArgument(f"device {text[:80]!r} is not HOST[:CONTAINER][:rwm]")
    for path in (source, target):
        if not path.startswith("/") or ".." in path.split("/"):
            raise InvalidArgument(f"device {text[:80]!r}: {path!r} is not an absolute path without '..'")
    if os.path.isdir(source):
        found = [look_up(p, target + str(p)[len(source) :], access) for p in _nodes(Path(source))]
        if not found:
            raise InvalidArgument(f"device {source}: no device is in this directory")
        return found
    return [look_up(Path(source), target, access)]


def look_up(source: Path, target: str, access: str = "rwm") -> Device:
    """One device of this host. NotFound, InvalidArgument: it is none."""
    try:
        info = source.stat()
    except OSError as e:
        raise NotFound(f"device {source}: {e.strerror}") from None
    kind = "b" if stat.S_ISBLK(info.st_mode) else "c" if stat.S_ISCHR(info.st_mode) else ""
    if not kind:
        raise InvalidArgument(f"{source} is not a device")
    mode = stat.S_IMODE(info.st_mode)
    device = info.st_rdev
    return Device(target, kind, os.major(device), os.minor(device), mode, info.st_uid, info.st_gid, access)


def all_of_host(root: Path = Path("/dev")) -> list[Device]:
    """Every device of this host, as a privileged container has them."""
    return [look_up(path, str(path)) for path in _nodes(root)]


def _nodes(directory: Path) -> Iterator[Path]:
    """Block and character devices below a directory, at most NODES_MAX; links are not followed."""
    count = 0
    for base, folders, files in os.walk(directory):
        folders[:] = sorted(name for name in folders if name not in _NOT_THE_HOSTS and not name.startswith("."))
        for name in sorted(files):
            path = Path(base, name)
            mode = path.lstat().st_mode
            if name in _NOT_THE_HOSTS or not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
                continue
            count += 1
            if count > NODES_MAX:
                return
            yield path
