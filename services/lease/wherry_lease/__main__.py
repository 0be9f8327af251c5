"""Wiring of the lease service."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared.errors import InvalidArgument
from wherry_shared.runtime import Host, run

from . import metadata
from .leases import Registry
from .service import LeaseService, Sweeper

SWEEP_SECONDS = "10"


async def build(host: Host) -> LeaseService:
    database = await host.database(metadata.MIGRATIONS)
    registry = Registry(metadata.Rows(database))
    sweeper = Sweeper(registry, _seconds(host.settings.options.get("sweep_seconds", SWEEP_SECONDS)))
    sweeper.start()
    host.on_stop(sweeper.stop)
    host.plugin(type="io.containerd.grpc.v1", id="leases")
    return LeaseService(registry)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.01 <= seconds <= 86400:
        raise InvalidArgument(f"sweep_seconds={text!r} is not a time: 0.01 to 86400 seconds are")
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    run("lease", build, arguments)


if __name__ == "__main__":
    main()
