"""What a worker does while it waits for its first request: it touches what that will touch.

A forked process gets a copy of a page with its first write to it, and running code writes: it counts references. Some
hundred pages of a launch need not wait until there is something to launch.
"""

from __future__ import annotations

import os

from wherry_task.monitor import cgroups, compact, libc, mounts, operations, wire
from wherry_task.monitor.stdio import Stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Args = dict[str, Any]

_OPTIONS = ["workdir=/work", "upperdir=/upper", "lowerdir=/lower", "index=off"]
_REQUEST = compact.dumps({
    "id": 1, "op": "launch", "bundle": "/bundle", "container": "container", "runtime": "/usr/bin/crun", "root": "/root",
    "mounts": [{"type": "overlay", "source": "overlay", "target": "", "options": _OPTIONS}], "poststart": False,
    "plain": True, "stdin": "", "stdout": "", "stderr": "", "terminal": False, "copy": False,
})  # fmt: skip


def warm() -> None:
    """Go through a launch as far as it changes nothing but this process."""
    args = wire.take(bytearray(wire.frame(_REQUEST))) or {}
    about = operations.describe_bundle(args)
    runtime = operations.runtime_of(about)
    for each in operations.mount_list(args):
        mounts.parse_options(each["options"])
    _mount_nothing()
    stdio = Stdio()
    stdio.open("", "", "", False)
    for fd in stdio.child:
        os.close(fd)
    about["init"] = {"pid": os.getpid(), "start_time": operations.start_time(os.getpid())}
    about["own_pid_namespace"] = operations.first_of_its_namespace(os.getpid())
    about["oom_file"] = cgroups.memory(cgroups.of(os.getpid()))
    made = operations.Result({**about, "state": runtime.state}, 1, [("stdin", [])])
    wire.reply(args["id"], made.body)


def _mount_nothing() -> None:
    try:
        libc.mount(None, "", None, libc.MS_SLAVE)
    except OSError:
        return  # nothing has that name
