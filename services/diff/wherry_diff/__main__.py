"""Wiring of the diff service."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from wherry_shared.api.content import Content
from wherry_shared.api.diff import Diff
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.runtime import Host, run

from . import processors
from .limits import Limits
from .pool import Pool
from .service import SNAPSHOTTERS, DiffService

LATER = ("multiprocessing.popen_fork", "multiprocessing.synchronize")


async def build(host: Host) -> Diff:
    """Settings: workers (working processes; default the host's cores, at most 4), processors (a file, see
    `processors.py`), snapshotters (comma-separated: those whose mounts a tenant may give)."""
    options = host.settings.options
    known = processors.load(Path(options["processors"])) if options.get("processors") else ()
    spool = host.settings.own_root
    spool.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in spool.glob("layer-*"):
        left.unlink(missing_ok=True)
    pool = Pool(int(options.get("workers", min(4, os.cpu_count() or 1))), spool)
    await pool.start()

    async def stop() -> None:
        pool.close()

    host.on_stop(stop)
    host.plugin(type="io.containerd.differ.v1", id="walking")
    snapshotters = [name for name in options.get("snapshotters", "").split(",") if name]
    return DiffService(
        host.bus.proxy(Content), host.bus.proxy(Snapshots), pool, Limits(), spool, processors=known,
        snapshotters=snapshotters or SNAPSHOTTERS,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the service until it is told to stop."""
    run("diff", build, arguments)


if __name__ == "__main__":
    main()
