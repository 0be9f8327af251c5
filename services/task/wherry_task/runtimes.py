"""Which binary a runtime's name means."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from wherry_shared.errors import InvalidArgument, NotFound, PermissionDenied

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# crun first: a whole life takes it a quarter of runc's time.
PREFERRED = ("crun", "runc", "youki")
# containerd's names for what we drive ourselves where no shim is installed.
ALIASES = {"io.containerd.runc.v2": "runc", "io.containerd.runc.v1": "runc"}
_SHIM_BINARY = re.compile(r"containerd-shim-([a-z0-9-]+)-(v[0-9]+)\Z")
# containerd's rule: the last two parts of a runtime's name are its shim's.
_SHIM = re.compile(r"(?:[a-z0-9-]+\.)+([a-z0-9-]+)\.(v[0-9]+)\Z")


def find(name: str, allowed: Collection[str] = ()) -> str:
    """The path of a runtime's binary.

    `default`: the first of crun, runc, youki that is installed. `io.containerd.<name>.v2` is the shim v2 binary
    `containerd-shim-<name>-v2`; runc's own without such. A path must be one that the node's admin allowed.
    InvalidArgument: no such runtime is known. NotFound: it is not installed. PermissionDenied: the path.
    """
    if name == "default":
        for candidate in PREFERRED:
            if found := shutil.which(candidate, path=PATH):
                return found
        raise NotFound(f"no OCI runtime is installed: none of {', '.join(PREFERRED)} is on {PATH}")
    if name.startswith("/"):
        if os.path.normpath(name) != name or name not in allowed:
            raise PermissionDenied(f"runtime {name!r} is not among those that this node allows")
        if not os.access(name, os.X_OK):
            raise NotFound(f"runtime {name!r} is not installed")
        return name
    shim = _SHIM.match(name)
    if shim and (path := shutil.which(f"containerd-shim-{shim[1]}-{shim[2]}", path=PATH)):
        return path
    if shim and name not in ALIASES:
        raise NotFound(f"runtime {name!r}: containerd-shim-{shim[1]}-{shim[2]} is not installed on this node")
    binary = ALIASES.get(name, name)
    if binary not in PREFERRED:
        raise InvalidArgument(f"runtime {name!r} is not known: {', '.join(PREFERRED)} and allowed paths are")
    found = shutil.which(binary, path=PATH)
    if found is None:
        raise NotFound(f"runtime {name!r}: {binary} is not installed on this node")
    return found


def installed() -> list[str]:
    """The names of the runtimes that are there."""
    shims = {
        f"io.containerd.{match[1]}.{match[2]}"
        for folder in PATH.split(":")
        for path in Path(folder).glob("containerd-shim-*")
        if (match := _SHIM_BINARY.match(path.name))
    }
    return [name for name in PREFERRED if shutil.which(name, path=PATH)] + sorted(shims)
