"""Wiring of the namespace service."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared.api.events import Events
from wherry_shared.runtime import Host, run

from . import metadata
from .missed import Missed
from .probes import Probes
from .registry import Registry
from .service import NamespaceService
from .watcher import Watcher


async def build(host: Host) -> NamespaceService:
    database = await host.database(metadata.MIGRATIONS)
    registry = Registry(metadata.table(database), Probes(host.bus))
    watcher = Watcher(registry, host.bus, Missed(registry, database, host.bus.proxy(Events)))
    await watcher.start()
    host.on_stop(watcher.stop)
    host.plugin(type="io.containerd.grpc.v1", id="namespaces")
    return NamespaceService(registry)


def main(arguments: Sequence[str] | None = None) -> None:
    run("namespace", build, arguments)


if __name__ == "__main__":
    main()
