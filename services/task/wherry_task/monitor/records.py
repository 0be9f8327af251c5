"""Small JSON files that survive a crash of whoever writes them: written aside and renamed."""

from __future__ import annotations

import os

from wherry_task.monitor import compact

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

EXITS = "exits"
ABOUT = "monitor.json"
_CHUNK, _MOST = 1 << 13, 1 << 20


def write(path: str, record: dict[str, Any] | bytes) -> None:
    """Replace the file with the record; when this returns, no kill of any process can undo it. Raises OSError.

    Nothing is synced: what a power cut takes from here it takes from a container that it has ended too, and its exit
    is told to nobody before the service has it in its own database, which is synced.
    """
    folder, _, name = path.rpartition("/")
    aside = f"{folder}/.{name}.new" if folder else f".{name}.new"
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(fd, record if isinstance(record, bytes) else compact.dumps(record))
    finally:
        os.close(fd)
    os.rename(aside, path)


def contents(path: str, flags: int = 0) -> bytes:
    """A file of up to a MiB, by system calls alone: the layers of `open` would write dozens of pages. OSError."""
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        data = part = os.read(fd, _CHUNK)
        while part and len(data) < _MOST:
            part = os.read(fd, _CHUNK)
            data += part
    finally:
        os.close(fd)
    return data


def read(path: str) -> dict[str, Any]:
    """The record. Raises OSError where there is none and ValueError where it is damaged."""
    record = compact.loads(contents(path, os.O_NOFOLLOW))
    if not isinstance(record, dict):
        raise ValueError(f"{path} does not hold an object")
    return record


def remove(path: str) -> None:
    """Remove the file if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def exit_path(exec_id: str, bundle: str = "") -> str:
    """Where the exit of the init ("") or of an exec is kept; an exec named `init` cannot take the init's place."""
    return os.path.join(bundle, EXITS, f"exec-{exec_id}" if exec_id else "init")


def exits(bundle: str = "") -> list[dict[str, Any]]:
    """Every exit on record, execs first; a damaged record is left out."""
    found = []
    folder = os.path.join(bundle, EXITS)
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    for name in names:
        if not name.startswith("."):
            try:
                found.append(read(os.path.join(folder, name)))
            except ValueError:
                continue
    return found
