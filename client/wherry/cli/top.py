"""`wherry top`: the processes of a container, as the node numbers them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Format, FormatOption, NamespaceOption, show, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    id: Annotated[str, typer.Argument(help="The container.")],
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    async def work(client: Client) -> None:
        from wherry import nearby
        from wherry.container import find

        container = await find(client, id)
        pids = await client.tasks.pids(container.id)
        if not nearby.is_here(client):
            # Elsewhere these numbers are other processes'.
            show([{"pid": p.pid, "exec": p.exec_id} for p in pids], ["pid", "exec"], format)
            return
        rows = [row for p in pids if (row := _row(p.pid, p.exec_id))]
        show(rows, ["uid", "pid", "ppid", "cpu", "started", "tty", "time", "exec", "command"], format)

    with_client(namespace, work)


def _row(pid: int, exec_id: str) -> dict[str, Any] | None:
    """A process from /proc; None when it has ended meanwhile."""
    directory = Path(f"/proc/{pid}")
    try:
        words = (directory / "stat").read_text().rpartition(")")[2].split()
        name = (directory / "comm").read_text().strip()
        arguments = (directory / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        uid = directory.stat().st_uid
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError):
        return None
    # proc(5), counted from the state, which follows the name: ppid, tty, utime, stime, starttime.
    ppid, tty, ticks, begun = int(words[1]), int(words[4]), int(words[11]) + int(words[12]), int(words[19])
    per_second = os.sysconf("SC_CLK_TCK")
    lived, used = max(uptime - begun / per_second, 0.01), ticks / per_second
    return {
        "uid": uid, "pid": pid, "ppid": ppid, "cpu": f"{100 * used / lived:.0f}",
        "started": time.strftime("%H:%M", time.localtime(time.time() - lived)),
        "tty": f"pts/{tty & 0xFF}" if 136 <= tty >> 8 <= 143 else "?" if not tty else str(tty),
        "time": f"{int(used) // 3600:02}:{int(used) // 60 % 60:02}:{int(used) % 60:02}",
        "exec": exec_id, "command": arguments or f"[{name}]",
    }  # fmt: skip
