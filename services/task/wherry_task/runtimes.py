"""Which binary a runtime's name means."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection

from wherry_shared.errors import InvalidArgument, NotFound, PermissionDenied

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# crun first: a whole life takes it a quarter of runc's time.
PREFERRED = ("crun", "runc", "youki")
# containerd's names for what we drive ourselves.
ALIASES = {"io.containerd.runc.v2": "runc", "io.containerd.runc.v1": "runc"}


def find(name: str, allowed: Collection[str] = ()) -> str:
    """The path of a runtime's binary.

    `default`: the first of crun, runc, youki that is installed. A path must be one that the node's admin allowed.
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
    binary = ALIASES.get(name, name)
    if binary not in PREFERRED:
        raise InvalidArgument(f"runtime {name!r} is not known: {', '.join(PREFERRED)} and allowed paths are")
    found = shutil.which(binary, path=PATH)
    if found is None:
        raise NotFound(f"runtime {name!r}: {binary} is not installed on this node")
    return found


def installed() -> list[str]:
    """The names of the runtimes that are there."""
    return [name for name in PREFERRED if shutil.which(name, path=PATH)]
