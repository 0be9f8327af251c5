"""What runtimes tell of themselves: their binaries are asked, and asked again when they have changed."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from asyncio.subprocess import DEVNULL, PIPE
from contextlib import suppress
from typing import Any

from wherry_shared.api.introspection import Runtime
from wherry_shared.errors import NotFound, Unavailable

log = logging.getLogger("wherry.introspection")

PATIENCE = 5.0
# "runc version 1.1.5+ds1", "commit: 1.1.5+ds1-1"; a shim says "  Version:  1.6.20~ds1", "  Revision: 1.6.20~ds1-1".
_VERSION = re.compile(r"^\s*(?:\S+ )?version:?\s+(\S+)", re.MULTILINE | re.IGNORECASE)
_REVISION = re.compile(r"^\s*(?:commit|revision):\s*(\S+)", re.MULTILINE | re.IGNORECASE)

_Stamp = tuple[int, int, int]


class Programs:
    """Remembers what each binary said."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[_Stamp, Runtime]] = {}

    async def describe(self, name: str, path: str) -> Runtime:
        """Ask a runtime's binary, which must be root's or ours alone to write: its path was told on the bus.

        NotFound: there is no such binary to be seen from here. Unavailable: it does not tell its version.
        """
        try:
            info = os.stat(path)
        except OSError as e:
            raise NotFound(f"runtime {name}: {path}: {e.strerror}, as the introspection service sees it") from None
        if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022 or not path.startswith("/"):
            raise NotFound(f"runtime {name}: {path} can be changed by others: it is not run")
        stamp = info.st_mtime_ns, info.st_size, info.st_ino
        known = self._known.get((name, path))
        if known is None or known[0] != stamp:
            known = self._known[name, path] = stamp, await _ask(name, path)
        return known[1]


async def _ask(name: str, path: str) -> Runtime:
    is_shim = os.path.basename(path).startswith("containerd-shim-")
    said = await _output(path, "-v" if is_shim else "--version")
    version = _VERSION.search(said)
    if version is None:
        raise Unavailable(f"runtime {name}: {path} does not tell its version")
    revision = _REVISION.search(said)
    features = {} if is_shim else _features(await _output(path, "features"))
    return Runtime(
        name=name, path=path, version=version[1], revision=revision[1] if revision else "", features=features
    )


def _features(said: str) -> dict[str, Any]:
    """runtime-spec features.md; older runtimes do not know the command and say so."""
    try:
        found = json.loads(said)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


async def _output(*command: str) -> str:
    """What a command prints, "" when it fails. Unavailable: it cannot be run, or does not end."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, env={"PATH": os.defpath}
        )
    except OSError as e:
        raise Unavailable(f"{command[0]}: {e.strerror}") from None
    try:
        async with asyncio.timeout(PATIENCE):
            said, _ = await process.communicate()
    except TimeoutError:
        raise Unavailable(f"{' '.join(command)} does not end") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
    if process.returncode:
        log.info("%s ended with %s", " ".join(command), process.returncode)
        return ""
    return said.decode("utf-8", "replace")
