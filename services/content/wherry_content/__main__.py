"""Wiring of the content service."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared.api.lease import Leases
from wherry_shared.api.namespace import Namespaces
from wherry_shared.errors import InvalidArgument
from wherry_shared.heap import keep_heap
from wherry_shared.runtime import Host, run

from . import backends, metadata
from .collect import ContentCollector
from .metadata import Metadata
from .service import ContentService
from .sharing import Policy, Sharing
from .store import IDLE_SECONDS, Store

LATER = (backends.BUILT_IN["local"],)


async def build(host: Host) -> ContentService:
    options = host.settings.options
    policy = Policy.parse(options.get("sharing", Policy.isolated))
    name = options.get("backend", "local")
    backend = backends.find(name)(host.settings.own_root)
    # Replicas on one root share the database; a blob's file and row change together under its write lock.
    database = await host.database(metadata.MIGRATIONS, shared=backend.replicable)
    rows = Metadata(database)
    sharing = Sharing(rows, policy, host.bus.proxy(Namespaces))
    store = Store(rows, backend, instance=host.instance, idle=_idle(options.get("idle")), sharing=sharing)
    await store.start()
    host.on_stop(store.stop)
    host.plugin(type="io.containerd.content.v1", id="content", capabilities=[name])
    host.also_serve(ContentCollector(database, store))
    return ContentService(store, host.bus.proxy(Leases))


def _idle(text: str | None) -> float:
    try:
        seconds = float(text) if text else IDLE_SECONDS
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise InvalidArgument(f"setting idle={text!r} is not a number of seconds")
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    keep_heap()
    run("content", build, arguments)


if __name__ == "__main__":
    main()
