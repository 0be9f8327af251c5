"""Wiring of the diff service."""

from __future__ import annotations

import os
from collections.abc import Sequence

from wherry_shared.api.content import Content
from wherry_shared.api.diff import Diff
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.runtime import Host, run

from .limits import Limits
from .pool import Pool
from .service import DiffService


async def build(host: Host) -> Diff:
    """Settings: workers (extracting processes; default the host's cores, at most 4)."""
    pool = Pool(int(host.settings.options.get("workers", min(4, os.cpu_count() or 1))))
    await pool.start()

    async def stop() -> None:
        pool.close()

    host.on_stop(stop)
    spool = host.settings.own_root
    spool.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in spool.glob("layer-*"):
        left.unlink(missing_ok=True)
    host.plugin(type="io.containerd.differ.v1", id="walking")
    return DiffService(host.bus.proxy(Content), host.bus.proxy(Snapshots), pool, Limits(), spool)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the service until it is told to stop."""
    run("diff", build, arguments)


if __name__ == "__main__":
    main()
