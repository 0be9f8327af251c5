"""The mark of the stream's end: it may call nothing lost that is only on its way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from housebus import NODE, HouseBus, HouseServer
from wherry_events.mark import Mark
from wherry_shared.bus import events, subjects
from wherry_shared.bus.credentials import stream_name
from wherry_shared.bus.stream import JetStreamLog
from wherry_shared.bus.transport import LogState

SUBJECT = f"{subjects.EV}.{NODE}.default.test.made"


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[HouseBus]:
    with HouseServer(tmp_path / "bus") as server:
        bus = await server.bus()
        yield bus
        await bus.close()


class Busy(JetStreamLog):
    """A stream that acknowledges an event after each answer of its state, before that is looked at."""

    mark: Mark | None = None
    published = 0

    async def state(self) -> LogState:
        state = await super().state()
        if self.mark is not None:
            self.published += 1
            data = b"%d" % self.published
            self.mark.has(await events.publish(self._transport, events.Outgoing(SUBJECT, data, data.decode())), data)
        return state


async def test_what_is_acknowledged_while_the_state_is_asked_for_is_not_lost(bus: HouseBus) -> None:
    transport = (await bus.of("events")).transport
    log = Busy(transport, stream_name(NODE), f"{subjects.EV}.{NODE}.>")
    await log.ensure(max_age=3600, max_bytes=1 << 20)
    mark = Mark(log, transport)
    first = await mark.state()
    log.mark = mark
    for _ in range(5):
        assert (await mark.state()).epoch == first.epoch


async def test_its_end_where_nothing_can_be_written(bus: HouseBus, tmp_path: Path) -> None:
    """A disk that has become read-only, say, is no reason for the service not to end in order."""
    transport = (await bus.of("events")).transport
    log = JetStreamLog(transport, stream_name(NODE), f"{subjects.EV}.{NODE}.>")
    await log.ensure(max_age=3600, max_bytes=1 << 20)
    (tmp_path / "away").mkdir()
    mark = Mark(log, transport, tmp_path / "away/mark")
    await mark.start()
    (tmp_path / "away").rename(tmp_path / "elsewhere")
    mark.has(await events.publish(transport, events.Outgoing(SUBJECT, b"1", "1")), b"1")
    await mark.stop()
