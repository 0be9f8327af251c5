"""Wiring of the lease service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from wherry_shared.api.gc import (
    Collectable,
    ContainerCollection,
    ContentCollection,
    ImageCollection,
    SnapshotCollection,
)
from wherry_shared.collectable import Collection
from wherry_shared.errors import InvalidArgument
from wherry_shared.runtime import Host, run
from wherry_shared.sqlite import Database
from wherry_shared.values import now

from . import metadata
from .collector import Collector
from .leases import Registry
from .scheduler import Policy, Scheduler
from .service import CollectionService, LeaseService, Sweeper
from .watcher import Watcher

SWEEP_SECONDS = "10"


async def build(host: Host) -> LeaseService:
    database = await host.database(metadata.MIGRATIONS)
    registry = Registry(metadata.Rows(database))
    policy = _policy(host.settings.options)
    scheduler = Scheduler(Collector(_parts(host, database)), policy)
    sweeper = Sweeper(
        registry, _seconds(host.settings.options.get("sweep_seconds", SWEEP_SECONDS)), scheduler.deleted
    )  # fmt: skip
    watcher = Watcher(host.bus, scheduler.deleted, every=policy.deletion_threshold > 0)
    sweeper.start()
    host.on_stop(sweeper.stop)
    await watcher.start()
    host.on_stop(watcher.stop)
    scheduler.start()
    host.on_stop(scheduler.stop)
    host.plugin(type="io.containerd.grpc.v1", id="leases")
    host.plugin(type="io.containerd.gc.v1", id="scheduler")
    host.also_serve(CollectionService(scheduler))
    return LeaseService(registry, scheduler)


def _parts(host: Host, database: Database) -> dict[str, Collectable]:
    """Everything that is collected or keeps something. Its own part needs no bus."""
    proxy = host.bus.proxy
    return {
        "lease": Collection(database, [metadata.LeaseRecords(now)]), "image": proxy(ImageCollection),
        "container": proxy(ContainerCollection), "content": proxy(ContentCollection),
        "snapshot": proxy(SnapshotCollection),
    }  # fmt: skip


def _policy(options: Mapping[str, str]) -> Policy:
    """The scheduler's settings; times are in seconds."""
    given: dict[str, Any] = {}
    for field in fields(Policy):
        if (text := options.get(field.name)) is not None:
            try:
                given[field.name] = (int if field.name in ("deletion_threshold", "mutation_threshold") else float)(text)
            except ValueError:
                raise InvalidArgument(f"setting {field.name}={text!r} is no number") from None
    return Policy(**given)


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
