"""Where the logs of containers lie, and until when: as long as their containers, whatever becomes of their tasks."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path

from wherry_shared.errors import NotFound, ResourceExhausted, WherryError

log = logging.getLogger("wherry.task")

LOG, OWNER = "log", "container"
SWEEP_SECONDS = 60.0
SWEEP_MAX = 256

Born = Callable[[str, str], Awaitable[datetime | None]]
"""When the container of a namespace was created. NotFound."""


class Shelf:
    """The logs in one directory: `<namespace>/<container>/log`, and beside it whose it is."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._swept = ("", "")

    def path(self, namespace: str, container: str) -> Path:
        """Where the log of a container lies, if it has one."""
        return self._root / namespace / container / LOG

    def begin(self, namespace: str, container: str, born: datetime | None) -> Path:
        """The path of the log of a container's new task; that of an earlier container of this name goes.

        ResourceExhausted.
        """
        directory = self._root / namespace / container
        try:
            if self._owner(directory) != _text(born):
                shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            (directory / OWNER).write_text(_text(born))
        except OSError as e:
            raise ResourceExhausted(f"log of {container}: {e.strerror}") from None
        return directory / LOG

    def of(self, namespace: str, container: str, born: datetime | None) -> Path | None:
        """The log of this very container, if it has one."""
        directory = self._root / namespace / container
        return directory / LOG if self._owner(directory) == _text(born) else None

    def born(self, namespace: str, container: str) -> datetime | None:
        """When the container was created whose log lies here."""
        try:
            return datetime.fromisoformat(self._owner(self._root / namespace / container))
        except ValueError:
            return None

    async def sweep(self, busy: Callable[[str, str], bool], born: Born) -> int:
        """Remove the logs of containers that are gone, looking at a few hundred; answers how many went."""
        removed = 0
        for namespace, container in self._next():
            if busy(namespace, container):
                continue
            directory = self._root / namespace / container
            try:
                kept = self._owner(directory) == _text(await born(namespace, container))
            except NotFound:
                kept = False
            except WherryError as e:
                log.info("whether %s still exists cannot be told now: %s", container, e)
                return removed
            if not kept and not busy(namespace, container):
                shutil.rmtree(directory, ignore_errors=True)
                with suppress(OSError):
                    directory.parent.rmdir()
                removed += 1
        return removed

    def _next(self) -> list[tuple[str, str]]:
        """The next few hundred, each in its turn."""
        names = [(ns.name, c.name) for ns in _folders(self._root) for c in _folders(Path(ns.path))]
        names.sort()
        later = [name for name in names if name > self._swept]
        chosen = list(islice(later, SWEEP_MAX))
        self._swept = chosen[-1] if len(chosen) == SWEEP_MAX else ("", "")
        return chosen

    @staticmethod
    def _owner(directory: Path) -> str:
        try:
            return (directory / OWNER).read_text()
        except OSError:
            return ""


def _text(born: datetime | None) -> str:
    return born.isoformat() if born is not None else "unknown"


def _folders(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
