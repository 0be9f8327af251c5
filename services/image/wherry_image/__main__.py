"""Wiring of the image service."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared.api.lease import Leases
from wherry_shared.runtime import Host, run

from . import metadata
from .catalog import Catalog
from .service import ImageService


async def build(host: Host) -> ImageService:
    database = await host.database(metadata.MIGRATIONS)
    host.plugin(type="io.containerd.grpc.v1", id="images")
    return ImageService(Catalog(metadata.table(database)), host.bus.proxy(Leases))


def main(arguments: Sequence[str] | None = None) -> None:
    run("image", build, arguments)


if __name__ == "__main__":
    main()
