"""The events service as the node runs it: a process on a real nats-server, whose stream outlives both of them."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from housebus import NODE, PATIENCE, HouseServer
from wherry_shared import context
from wherry_shared.api.events import Envelope, Events
from wherry_shared.bus import Bus
from wherry_shared.bus.credentials import audit_stream_name, stream_name
from wherry_shared.errors import DeadlineExceeded, OutOfRange, PermissionDenied, Unavailable


class Place:
    """A nats-server and the service under it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.house = HouseServer(root / "bus", tenants=["default"])
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *settings: str, stderr: int | None = None) -> None:
        arguments = ["--node", NODE, "--root", self.root / "lib", "--state", self.root / "run"]
        arguments += ["--nats", self.house.nats.url, "--creds", self.house.creds]
        for setting in settings:
            arguments += ["--set", setting]
        self.process = subprocess.Popen([sys.executable, "-m", "wherry_events", *map(str, arguments)], stderr=stderr)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(number)
        return process.wait(PATIENCE)

    async def stream(self, verb: str) -> None:
        operator = await self.house.operator()
        await operator.request(f"$JS.API.STREAM.{verb}.{stream_name(NODE)}", b"", timeout=5.0)
        await operator.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    with made.house:
        yield made
        if made.process is not None:
            made.stop(signal.SIGKILL)


@pytest.fixture
async def bus(place: Place) -> AsyncIterator[Bus]:
    made = await place.house.connect()
    yield made
    await made.close()


@pytest.fixture
def events(bus: Bus) -> Events:
    return bus.proxy(Events, namespace="default")


async def publish(events: Events, *numbers: int, size: int = 0) -> None:
    with context.use(timeout=30):
        for n in numbers:
            await events.publish("/test/made", {"n": n, "padding": "x" * size})


async def published(events: Events, number: int) -> bool:
    """Whether it was, while the server comes back; the same id makes one event of all attempts."""
    again = Envelope(
        id="again", timestamp=datetime.now(UTC), namespace="default", topic="/test/made", event={"n": number}
    )
    try:
        await events.forward(again)
    except (Unavailable, DeadlineExceeded):
        return False
    return True


async def replay(events: Events, token: str = "") -> tuple[list[int], str]:
    """All that follows the token, and the token at the end."""
    found: list[int] = []
    with context.use(timeout=30):
        while True:
            window = await events.replay(token=token)
            found += [e.event["n"] for e in window.events]
            token = window.token
            if not window.more:
                return found, token


async def test_events_outlive_the_service_and_the_server(place: Place, events: Events) -> None:
    place.start()
    await publish(events, 0, 1)
    _, token = await replay(events)
    place.stop(signal.SIGKILL)
    place.start()
    await publish(events, 2)
    place.house.nats.kill()
    place.house.nats.start()
    async with asyncio.timeout(PATIENCE):
        while not await published(events, 3):
            await asyncio.sleep(0.05)
    following, end = await replay(events, token)
    assert (following, end.split("/")[:2]) == ([2, 3], [token.split("/")[0], "4"])
    assert (await replay(events))[0] == [0, 1, 2, 3]
    assert place.stop() == 0


async def test_a_stream_that_was_made_anew_is_another(place: Place, events: Events) -> None:
    place.start()
    await publish(events, 0)
    _, token = await replay(events)
    old = await events.stream()
    await place.stream("DELETE")
    place.stop()
    place.start()
    await publish(events, 1)
    assert (await events.stream()).epoch != old.epoch
    with pytest.raises(OutOfRange, match="made anew"):
        await events.replay(token=token)
    assert (await replay(events))[0] == [1]


async def test_a_stream_that_goes_away_is_made_again(place: Place, events: Events) -> None:
    """Nobody starts the service again for that; events wait in their outboxes as long as there is none."""
    place.start("audit=3600")
    await publish(events, 0)
    _, token = await replay(events)
    await place.stream("DELETE")
    async with asyncio.timeout(PATIENCE):
        while not await published(events, 1):
            await asyncio.sleep(0.05)
    assert (await replay(events))[0] == [1]
    with pytest.raises(OutOfRange, match="made anew"):
        await events.replay(token=token)


async def test_what_is_kept_is_bounded_and_a_gap_is_told(place: Place, events: Events) -> None:
    """`max_bytes` is a setting that a restart changes, also of a stream that is there."""
    place.start()
    await publish(events, *range(3), size=20_000)
    _, token = await replay(events)
    place.stop()
    place.start("max_bytes=100000")
    await publish(events, *range(3, 10), size=20_000)
    kept, _ = await replay(events)
    assert kept == list(range(10 - len(kept), 10))
    assert 0 < len(kept) <= 5
    with pytest.raises(OutOfRange, match="events after this token are no longer kept"):
        await events.replay(token=token)


@pytest.mark.parametrize(
    "setting", ["max_age=7d", "max_age=0", "max_age=nan", "max_bytes=1e9", "max_bytes=-5", "audit=yes"]
)
def test_a_setting_that_is_no_number(place: Place, setting: str) -> None:
    place.start(setting, stderr=subprocess.PIPE)
    assert place.process is not None
    _, said = place.process.communicate(timeout=PATIENCE)
    name, _, value = setting.partition("=")
    assert said.decode().splitlines()[-1].startswith(f"wherry-events: {name} {value!r} is no whole number")


async def test_the_last_token_before_everything_went_still_holds(place: Place, events: Events) -> None:
    """Nothing is missed: what was purged had been read."""
    place.start()
    await publish(events, 0, 1)
    _, token = await replay(events)
    await place.stream("PURGE")
    assert await replay(events, token) == ([], token)
    await publish(events, 2)
    assert (await replay(events, token))[0] == [2]


async def test_a_tenant_sees_and_makes_events_of_its_own_namespace_only(place: Place, events: Events) -> None:
    place.start()
    await publish(events, 0)
    tenant = await place.house.connect("tenant-default")
    try:
        own = tenant.proxy(Events, namespace="default")
        assert (await own.publish("/test/made", {"n": 1})).namespace == "default"
        assert (await replay(own))[0] == [0, 1]
        for foreign in (tenant.proxy(Events), tenant.proxy(Events, namespace="other")):
            with context.use(timeout=PATIENCE), pytest.raises(PermissionDenied):
                await foreign.replay()
    finally:
        await tenant.close()


async def test_two_services_share_one_stream(place: Place, bus: Bus, events: Events) -> None:
    place.start()
    await publish(events, 0)
    first = place.process
    place.start()
    try:
        await asyncio.gather(*(publish(events, n) for n in range(1, 30)))
        assert sorted((await replay(events))[0]) == list(range(30))
    finally:
        assert first is not None
        first.terminate()
        assert first.wait(PATIENCE) == 0


async def test_the_audit_is_kept_where_it_is_wanted(place: Place) -> None:
    place.start("audit=3600")
    admin, auditor = await place.house.connect(), await place.house.connect("auditor")
    tenant = await place.house.connect("tenant-default")
    wrong = Envelope(id="1", timestamp=datetime.now(UTC), namespace="other", topic="/x/y", event={}, node="")
    with context.use(timeout=20):
        await admin.proxy(Events).stream()
        with pytest.raises(PermissionDenied):
            await tenant.proxy(Events, namespace="default").forward(wrong)
        log = auditor.transport.event_log(audit_stream_name(NODE), "wherry.audit.v1.n1.>")
        while not (stored := await log.read()):  # nobody waits for the stream to have it
            await asyncio.sleep(0.01)
        (kept,) = stored
    assert kept.subject == f"wherry.audit.v1.{NODE}.default.events"
    assert json.loads(kept.data)["operation"] == "forward" and json.loads(kept.data)["identity"] == "tenant-default"
    assert (await admin.proxy(Events).stream()).last == 0  # it is no event
    for bus in (admin, auditor, tenant):
        await bus.close()
