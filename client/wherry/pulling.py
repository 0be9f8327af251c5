"""Whose pull a lease is of: what an interrupted one has fetched is kept until another has brought the image here."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from wherry_shared.boot import boot_id

# Marks of the pulls of this process that are under way.
_under_way: set[str] = set()


def begin() -> str:
    """A mark for the lease of a pull of this process; `end` it with the pull, however that ends."""
    mark = f"{_process(os.getpid())} {secrets.token_hex(8)}"
    _under_way.add(mark)
    return mark


def end(mark: str) -> None:
    """The pull is over, or was interrupted."""
    _under_way.discard(mark)


def is_given_up(mark: str) -> bool:
    """Whether nobody goes on with that pull, as far as it can be known: of a process on another host it cannot."""
    if mark in _under_way:
        return False
    process, _, _ = mark.rpartition(" ")
    pid = process.rpartition(" ")[0].rpartition(" ")[2]
    here, there = _host(), process.rsplit(" ", 2)[0]
    if not here or here != there or not pid.isdecimal():
        return False
    return int(pid) == os.getpid() or _process(int(pid)) != process


def _process(pid: int) -> str:
    """A process, as none other is called: its host since the boot, its pid there, and when it began. One that has
    ended is called otherwise."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return f"{_host()} {pid} -"
    return f"{_host()} {pid} {fields[18] if state not in 'ZX' else '-'}"


def _host() -> str:
    """This boot of this host, and its pids' namespace; "" where nothing tells."""
    try:
        return f"{boot_id()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""
