"""The rich client of Wherry: `wherry.connect()` and what hangs on it.

Everything that is not a service's own rule is the client's work: pulling, unpacking, writing the runtime
specification, carrying stdio. Names are loaded when they are first used, so that the command line starts quickly.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from wherry_shared.errors import (
        Aborted,
        AlreadyExists,
        DataLoss,
        DeadlineExceeded,
        FailedPrecondition,
        InvalidArgument,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        Unknown,
        WherryError,
    )
    from wherry_shared.values import Descriptor, Mount, Platform

    from .client import Client, connect
    from .container import Container
    from .image import Image
    from .progress import Progress
    from .stdio import Stdio
    from .task import Completed, ExitStatus, Process, Task
    from .usage import State, Usage
    from .watch import Gap, Listed, Watch

_HOME = {
    ".client": ("Client", "connect"),
    ".container": ("Container",),
    ".image": ("Image",),
    ".progress": ("Progress",),
    ".stdio": ("Stdio",),
    ".task": ("Completed", "ExitStatus", "Process", "Task"),
    ".usage": ("State", "Usage"),
    ".watch": ("Gap", "Listed", "Watch"),
    "wherry_shared.values": ("Descriptor", "Mount", "Platform"),
    "wherry_shared.errors": (
        "Aborted", "AlreadyExists", "DataLoss", "DeadlineExceeded", "FailedPrecondition", "InvalidArgument",
        "NotFound", "PermissionDenied", "ResourceExhausted", "Unauthenticated", "Unavailable", "Unimplemented",
        "Unknown", "WherryError",
    ),
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Client",
    "Completed",
    "Container",
    "DataLoss",
    "DeadlineExceeded",
    "Descriptor",
    "ExitStatus",
    "FailedPrecondition",
    "Gap",
    "Image",
    "InvalidArgument",
    "Listed",
    "Mount",
    "NotFound",
    "PermissionDenied",
    "Platform",
    "Process",
    "Progress",
    "ResourceExhausted",
    "State",
    "Stdio",
    "Task",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "Usage",
    "Watch",
    "WherryError",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'wherry' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name], __name__), name)
