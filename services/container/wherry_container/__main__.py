"""Wiring of the container service."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared.runtime import Host, run

from . import metadata
from .catalog import Catalog
from .collect import ContainerCollector
from .service import ContainerService


async def build(host: Host) -> ContainerService:
    database = await host.database(metadata.MIGRATIONS)
    host.plugin(type="io.containerd.grpc.v1", id="containers")
    host.also_serve(ContainerCollector(database))
    return ContainerService(Catalog(metadata.table(database)))


def main(arguments: Sequence[str] | None = None) -> None:
    run("container", build, arguments)


if __name__ == "__main__":
    main()
