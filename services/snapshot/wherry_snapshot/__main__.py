"""Wiring of the snapshot service."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import EntryPoint

from wherry_shared.api.lease import Leases
from wherry_shared.errors import WherryError
from wherry_shared.runtime import Host, run
from wherry_shared.values import check_identifier

from . import backends, metadata
from .backends import Backend, Factory
from .collect import SnapshotCollector
from .metadata import Rows
from .service import SnapshotService
from .snapshotter import Snapshotter

log = logging.getLogger("wherry.snapshot")

LATER = tuple(entry.module for entry in backends.OWN)
PLUGIN = "io.containerd.snapshotter.v1"


async def build(host: Host) -> SnapshotService:
    rows = Rows(await host.database(metadata.MIGRATIONS))
    found: dict[str, Snapshotter] = {}
    broken: dict[str, str] = {}
    for name, entry_point in sorted(backends.available().items()):
        try:
            backend = _load(host, name, entry_point)
        except (WherryError, OSError, ImportError, AttributeError) as e:
            log.warning("snapshotter %s cannot be had: %s", name, e)
            broken[name] = str(e)
            host.plugin(type=PLUGIN, id=name, init_error=str(e))
            continue
        found[name] = Snapshotter(name, rows, backend, host.settings.options.get("sync", "background"))
        host.on_stop(found[name].close)
        await found[name].start(restored=host.settings.restores)
        host.plugin(
            type=PLUGIN, id=name, capabilities=sorted(backend.capabilities),
            exports={"root": str(backend.root)},
        )  # fmt: skip
    host.also_serve(SnapshotCollector(rows, found))
    return SnapshotService(found, host.bus.proxy(Leases), broken)


def _load(host: Host, name: str, entry_point: EntryPoint) -> Backend:
    factory: Factory = entry_point.load()
    return factory(host.settings.own_root / check_identifier(name, "snapshotter"), host.settings.options)


def main(arguments: Sequence[str] | None = None) -> None:
    run("snapshot", build, arguments)


if __name__ == "__main__":
    main()
