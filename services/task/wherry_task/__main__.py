"""Wiring of the task service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from wherry_shared.api.container import Containers
from wherry_shared.api.content import Content
from wherry_shared.api.snapshot import Snapshots
from wherry_shared.api.task import Tasks
from wherry_shared.errors import WherryError
from wherry_shared.runtime import Host, run

from . import metadata, runtimes
from .backends import Launchers
from .backends.oci import OciLauncher
from .backends.shim import ShimLauncher
from .bundles import Bundles
from .checkpoints import Checkpoints
from .lingering import Lingering
from .processes import Processes
from .recovery import remove_unused_fifos
from .removals import Removals
from .service import TaskService
from .stdio.shelf import SWEEP_SECONDS
from .stdio.streams import Streams
from .supervisor import Supervisor

log = logging.getLogger("wherry.task")


async def build(host: Host) -> Tasks:
    """Settings: runtimes (paths of OCI runtimes that containers may name), loggers (directories of programs that
    `binary://` may name); both colon-separated."""
    state = host.settings.own_state
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = await host.database(metadata.MIGRATIONS)
    launcher = Launchers(OciLauncher(state), ShimLauncher(state))
    supervisor = Supervisor(database, launcher, Bundles(state), Streams(host.settings.own_root / "logs"))
    await supervisor.recover()

    async def sweep_fifos() -> None:
        await asyncio.to_thread(remove_unused_fifos, host.settings.state / "fifo", supervisor.stdio())

    await sweep_fifos()

    async def stop() -> None:
        await supervisor.stop(everything=host.immediate_stop)

    host.on_stop(stop)
    for name in runtimes.installed():
        host.plugin(type="io.containerd.runtime.v2", id=name, exports={"path": runtimes.find(name)})
    allowed, loggers = (
        [path for path in host.settings.options.get(name, "").split(":") if path] for name in ("runtimes", "loggers")
    )
    containers, snapshots = host.bus.proxy(Containers), host.bus.proxy(Snapshots)
    removals = Removals(database, supervisor, containers, snapshots)
    removals.recover()
    host.on_stop(removals.stop)
    lingering = Lingering(supervisor)
    lingering.recover()
    host.on_stop(lingering.stop)
    content = host.bus.proxy(Content)
    checkpoints = Checkpoints(host.settings.own_root / "checkpoints", content)
    await asyncio.to_thread(checkpoints.sweep, supervisor.waits)
    service = TaskService(
        supervisor, containers, snapshots, host.settings.state, checkpoints, Processes(content), allowed, loggers,
        removals, lingering,
    )  # fmt: skip
    sweeping = asyncio.get_running_loop().create_task(_sweep(service.sweep_logs, sweep_fifos))

    async def stop_sweeping() -> None:
        sweeping.cancel()

    host.on_stop(stop_sweeping)
    return service


async def _sweep(*places: Callable[[], Awaitable[object]]) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        for sweep in places:
            try:
                await sweep()
            except (WherryError, OSError) as e:
                log.error("sweeping: %s", e)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the service until it is told to stop."""
    run("task", build, arguments)


if __name__ == "__main__":
    main()
