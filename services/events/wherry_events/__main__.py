"""Wiring of the events service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from wherry_shared.api.events import Events
from wherry_shared.bus import subjects
from wherry_shared.bus.credentials import audit_stream_name, stream_name
from wherry_shared.errors import InvalidArgument, Unavailable
from wherry_shared.runtime import Host, run

from .journal import Journal
from .kept import Kept
from .mark import Mark
from .metadata import MIGRATIONS, Rows
from .service import EventsService

MAX_AGE_SECONDS = 7 * 24 * 3600
MAX_BYTES, AUDIT_MAX_BYTES = 256 << 20, 64 << 20
MIN_BYTES = 64 << 10
JETSTREAM_SECONDS = 15.0


async def build(host: Host) -> Events:
    """Settings: max_age (seconds), max_bytes; audit (seconds that refusals are kept; without it they are not)."""
    node = host.settings.node
    log = host.bus.transport.event_log(stream_name(node), f"{subjects.EV}.{subjects.encode_token(node)}.>")
    options = host.settings.options
    age, size = _setting(options, "max_age", MAX_AGE_SECONDS, 1), _setting(options, "max_bytes", MAX_BYTES, MIN_BYTES)
    streams = [(log, age, size)]
    if options.get("audit"):
        subject = f"{subjects.AUDIT}.{subjects.encode_token(node)}.>"
        audit = host.bus.transport.event_log(audit_stream_name(node), subject)
        streams.append((audit, _setting(options, "audit", 0, 1), AUDIT_MAX_BYTES))

    async def make() -> None:
        for stream, max_age, max_bytes in streams:
            await stream.ensure(max_age=max_age, max_bytes=max_bytes)

    await _once_it_can(make)
    host.plugin(type="io.containerd.event.v1", id="stream")
    root = host.settings.own_root
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Shared: any number of processes may serve one stream.
    kept = Kept(Rows(await host.database(MIGRATIONS, shared=True)))
    await kept.restore(log, host.bus.transport)
    mark = Mark(log, host.bus.transport, root / "mark", make)
    await mark.start()
    host.on_stop(mark.stop)
    return EventsService(Journal(log, host.bus, kept, mark))


async def _once_it_can(make: Callable[[], Awaitable[None]]) -> None:
    """Make the streams, as soon as JetStream can: it recovers its streams after the server listens."""
    give_up = asyncio.get_running_loop().time() + JETSTREAM_SECONDS
    while True:
        try:
            return await make()
        except Unavailable:
            if asyncio.get_running_loop().time() > give_up:
                raise
            await asyncio.sleep(0.1)


def _setting(options: Mapping[str, str], name: str, default: int, least: int) -> int:
    """A setting that is a whole number, of seconds or bytes. InvalidArgument when it is none."""
    text = options.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) >= least):
        raise InvalidArgument(f"{name} {text!r} is no whole number of at least {least}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the service until it is told to stop."""
    run("events", build, arguments)


if __name__ == "__main__":
    main()
