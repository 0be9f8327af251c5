"""Wiring of the image service."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared.api.gc import Collections
from wherry_shared.api.lease import Leases
from wherry_shared.runtime import Host, run

from . import metadata
from .catalog import Catalog
from .collect import ImageCollector
from .service import ImageService


async def build(host: Host) -> ImageService:
    database = await host.database(metadata.MIGRATIONS)
    host.plugin(type="io.containerd.grpc.v1", id="images")
    host.also_serve(ImageCollector(database))
    return ImageService(Catalog(metadata.table(database)), host.bus.proxy(Leases), host.bus.proxy(Collections))


def main(arguments: Sequence[str] | None = None) -> None:
    run("image", build, arguments)


if __name__ == "__main__":
    main()
