"""What every implementation of Events must do, through its proxy: one stream, read from a time or a token."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from housebus import PATIENCE, HouseBus
from wherry_events import journal
from wherry_events.journal import EVENT_BYTES_MAX, Journal
from wherry_events.kept import Kept
from wherry_events.metadata import MIGRATIONS, Rows
from wherry_events.service import EventsService
from wherry_shared import context
from wherry_shared.api.events import Envelope, Events, Replay
from wherry_shared.bus import Bus, subjects
from wherry_shared.bus.credentials import stream_name
from wherry_shared.bus.events import encode
from wherry_shared.bus.subjects import TOPIC_MAX
from wherry_shared.bus.transport import EventLog
from wherry_shared.errors import FailedPrecondition, InvalidArgument, OutOfRange, PermissionDenied, ResourceExhausted
from wherry_shared.sqlite import Database

TIME = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)


async def log_of(bus: Bus) -> EventLog:
    """The stream, as the events service has it."""
    own = await bus.of("events") if isinstance(bus, HouseBus) else bus
    log = own.transport.event_log(stream_name(bus.node), f"{subjects.EV}.{bus.node}.>")
    await log.ensure(max_age=3600, max_bytes=1 << 26)
    return log


async def service_on(bus: Bus, kept: Kept) -> EventsService:
    own = await bus.of("events") if isinstance(bus, HouseBus) else bus
    return EventsService(Journal(await log_of(bus), own, kept))


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    database = await Database.open(tmp_path / "events.db", MIGRATIONS)
    yield Kept(Rows(database))
    await database.close()


@pytest.fixture
async def house(bus: Bus, kept: Kept) -> AsyncIterator[Bus]:
    await bus.serve(await service_on(bus, kept))
    yield bus


@pytest.fixture
def events(house: Bus) -> Events:
    return house.proxy(Events, namespace="default")


@pytest.fixture
def everywhere(house: Bus) -> Events:
    return house.proxy(Events)


def envelope(number: int = 0, *, namespace: str = "default", topic: str = "/tasks/exit") -> Envelope:
    return Envelope(
        id=f"id-{number}", timestamp=TIME, namespace=namespace, topic=topic, node="elsewhere", event={"n": number}
    )


def numbers(replay: Replay | Sequence[Envelope]) -> list[int]:
    return [e.event["n"] for e in (replay.events if isinstance(replay, Replay) else replay)]


async def test_a_new_stream_is_empty(events: Events) -> None:
    state, window = await events.stream(), await events.replay()
    assert (state.first, state.last, window.events, window.more) == (0, 0, [], False)
    assert state.epoch
    assert (await events.replay(token=window.token)).token == window.token


async def test_what_is_published_is_answered_seen_and_kept(house: Bus, events: Events) -> None:
    before = datetime.now(UTC)
    async with await house.subscribe() as seen, asyncio.timeout(PATIENCE):
        made = await events.publish("/my.app/made", {"a": [1, None, {"b": "ü"}]})
        assert await anext(seen) == made
    assert (made.namespace, made.topic, made.node) == ("default", "/my.app/made", house.node)
    assert made.event == {"a": [1, None, {"b": "ü"}]}
    assert before <= made.timestamp <= datetime.now(UTC)
    assert (await events.replay()).events == [made]
    state = await events.stream()
    assert (state.first, state.last) == (1, 1)


async def test_an_event_without_fields(events: Events) -> None:
    assert (await events.publish("/a")).event == {}
    assert [e.topic for e in (await events.replay()).events] == ["/a"]


async def test_a_forwarded_event_stays_as_it_was(house: Bus, events: Events) -> None:
    async with await house.subscribe(topic="/tasks/exit") as seen, asyncio.timeout(PATIENCE):
        await events.forward(envelope(7))
        assert await anext(seen) == envelope(7)
    assert (await events.replay()).events == [envelope(7)]


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "/",
        "tasks/exit",
        "/tasks/",
        "//exit",
        "/tasks/*",
        "/a b",
        "/tasks/exit/>",
        "/é",
        "/" + "/".join(["a" * 70] * 60),
    ],
)
async def test_a_bad_topic_is_refused(events: Events, topic: str) -> None:
    for call in (events.publish(topic, {}), events.forward(envelope(topic=topic))):
        with pytest.raises(InvalidArgument, match="topic"):
            await call
    assert (await events.stream()).last == 0


async def test_the_longest_topic_fits_into_a_control_line(events: Events) -> None:
    topic = "/" + "/".join(["a" * 63] * 16)
    assert len(topic) == TOPIC_MAX
    await events.publish(topic, {"n": 0})
    assert [e.topic for e in (await events.replay()).events] == [topic]


async def test_an_event_has_an_id_and_a_bounded_size(events: Events) -> None:
    for bad in ("", "x" * 129):
        with pytest.raises(InvalidArgument, match="1 to 128"):
            await events.forward(envelope().model_copy(update={"id": bad}))
    with pytest.raises(InvalidArgument, match="larger than"):
        await events.publish("/big", {"data": "x" * EVENT_BYTES_MAX})
    assert (await events.stream()).last == 0


async def test_an_event_of_another_namespace_is_not_forwarded(events: Events) -> None:
    with pytest.raises(PermissionDenied, match=r"'other'.*'default'"):
        await events.forward(envelope(namespace="other"))
    assert (await events.stream()).last == 0


async def test_outside_of_a_namespace_nothing_is_published(everywhere: Events) -> None:
    for call in (everywhere.publish("/a"), everywhere.forward(envelope())):
        with pytest.raises(FailedPrecondition, match="namespace is required"):
            await call


async def test_the_same_id_is_one_event(house: Bus, events: Events) -> None:
    async with await house.subscribe() as seen, asyncio.timeout(PATIENCE):
        for number in (1, 1, 2, 1):
            await events.forward(envelope(number))
        await events.forward(envelope(3))
        assert numbers([await anext(seen) for _ in range(3)]) == [1, 2, 3]
    assert numbers(await events.replay()) == [1, 2, 3]


async def test_the_same_key_is_one_event_over_restarts(house: Bus, events: Events, kept: Kept) -> None:
    with context.use(key="k"):
        made = await events.publish("/a", {"n": 1})
        assert await events.publish("/a", {"n": 1}) == made
        await house.drain()
        await house.serve(await service_on(house, kept))
        assert (await events.publish("/a", {"n": 1})).id == made.id
    assert (await events.replay()).events == [made]


async def test_a_replay_goes_on_where_its_token_says(events: Events) -> None:
    for n in range(5):
        await events.forward(envelope(n))
    first = await events.replay(limit=2)
    assert (numbers(first), first.more) == ([0, 1], True)
    second = await events.replay(token=first.token, limit=3)
    assert (numbers(second), second.more) == ([2, 3, 4], False)
    assert numbers(await events.replay(token=first.token)) == [2, 3, 4], "a token can be used again"
    assert numbers(await events.replay(token=second.token)) == []
    await events.forward(envelope(5))
    assert numbers(await events.replay(token=second.token)) == [5]


async def test_a_replay_begins_at_a_time(events: Events) -> None:
    await events.forward(envelope(0))
    await asyncio.sleep(0.01)
    cut = datetime.now(UTC)
    await asyncio.sleep(0.01)
    await events.forward(envelope(1))
    at = await events.replay(since=cut)
    assert numbers(at) == [1], "what counts is when the stream got it, not the event's own time"
    assert numbers(await events.replay(since=cut - timedelta(days=1))) == [0, 1]
    assert numbers(await events.replay(since=datetime(1971, 1, 1, tzinfo=UTC))) == [0, 1]
    later = await events.replay(since=cut + timedelta(hours=1))
    assert numbers(later) == []
    await events.forward(envelope(2))
    assert numbers(await events.replay(since=cut, token=at.token)) == [2], "the token wins"
    assert numbers(await events.replay(token=later.token)) == [2]


async def test_a_time_that_nats_server_cannot_count_is_before_or_after_all(events: Events) -> None:
    await events.forward(envelope(0))
    for year, found in ((1, [0]), (1500, [0]), (1969, [0]), (2262, []), (2300, []), (9999, [])):
        assert numbers(await events.replay(since=datetime(year, 12, 1, tzinfo=UTC))) == found, year


async def test_filters(events: Events, everywhere: Events) -> None:
    await events.publish("/tasks/exit", {"n": 0, "container_id": "a", "exit": {"status": 137}})
    await events.publish("/images/create", {"n": 1, "name": "redis"})
    await events.publish("/tasks/start", {"n": 2, "container_id": "b"})

    async def found(*filters: str) -> list[int]:
        return numbers(await events.replay(filters=list(filters)))

    assert await found('topic=="/tasks/exit"') == [0]
    assert await found("topic~=|^/tasks/|") == [0, 2]
    assert await found("event.container_id==b", "event.name") == [1, 2]
    assert await found("topic~=tasks,event.exit.status==137") == [0]
    assert await found("event.exit") == []
    assert await found("namespace==default") == [0, 1, 2]
    assert await found("nothing") == []
    assert numbers(await everywhere.replay(filters=["namespace==other"])) == []
    with pytest.raises(InvalidArgument, match="position"):
        await events.replay(filters=["topic=x"])


async def test_fields_are_as_they_stand_in_the_event(events: Events) -> None:
    event = {"n": 7, "oom": True, "io": {"terminal": False, "stdin": ""}, "labels": {"a.b/c.d": "x"}, "none": None}
    await events.publish("/tasks/exit", event)
    for matching in (
        "event.oom==true", "event.io.terminal==false", 'event.labels."a.b/c.d"==x', 'event.labels.a."b/c".d==x',
        "event.io.stdin!=a", "event.n==7",
    ):  # fmt: skip
        assert numbers(await events.replay(filters=[matching])) == [7], matching
    for other in ("event.io.stdin", "event.none", "event.labels.a", "event.io", "event.n.x", "event.oom==True"):
        assert numbers(await events.replay(filters=[other])) == [], other


async def test_who_filters_much_keeps_nobody_waiting(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_TURN", 0)  # each event a turn: how many there are is no matter of the machine
    for n in range(200):
        await events.publish("/a", {"n": n, "padding": "x" * 500})
    filters = [f"event.padding~=/[xyz]{{40}}{n}$/" for n in range(30)] + ["event.a==b"] * 900
    monkeypatch.setattr("wherry_shared.bus.proxy.FIRST_ATTEMPT", PATIENCE)  # a slow machine is not asked twice
    with context.use(timeout=PATIENCE):
        looking = asyncio.ensure_future(events.replay(filters=filters))
    answered = 0
    while not looking.done():
        await events.stream()
        answered += 1
    assert (await looking).events == [] and answered > 10


async def test_what_is_filtered_out_moves_the_token_on(events: Events) -> None:
    for n in range(4):
        await events.forward(envelope(n, topic="/a" if n < 3 else "/b"))
    token, seen, windows = "", [], 0
    while True:
        window = await events.replay(token=token, filters=['topic=="/b"'], limit=1)
        seen += numbers(window)
        token, windows = window.token, windows + 1
        if not window.more:
            break
    assert (seen, windows) == ([3], 1), "one call looks at as many as it has to"


async def test_a_namespace_sees_its_own_and_no_namespace_all(house: Bus, events: Events, everywhere: Events) -> None:
    other = house.proxy(Events, namespace="other.one")
    for n, (proxy, namespace) in enumerate([(events, "default"), (other, "other.one"), (events, "default")]):
        await proxy.forward(envelope(n, namespace=namespace))
    assert numbers(await events.replay()) == [0, 2]
    assert numbers(await other.replay()) == [1]
    assert numbers(await everywhere.replay()) == [0, 1, 2]
    first = await other.replay(limit=1)
    assert numbers(await everywhere.replay(token=first.token)) == [2], "a token is a place in the one stream"


async def test_windows_larger_than_a_page_are_read_whole(events: Events) -> None:
    """More than the 1000 that one answer may hold, and more bytes than fit into one."""
    for first in range(0, 1005, 67):
        await asyncio.gather(*(events.forward(envelope(n)) for n in range(first, first + 67)))
    order = numbers(await events.replay(limit=10**6))
    assert len(order) == 1000
    assert len((await events.replay(limit=0)).events) == 1
    blob = "x" * 200_000
    for n in range(1005, 1010):
        await events.publish("/big", {"n": n, "blob": blob})
    seen: list[int] = []
    sizes: list[int] = []
    token = ""
    for _ in itertools.count():
        window = await events.replay(token=token, limit=1000)
        seen += numbers(window)
        sizes.append(len(window.events))
        token = window.token
        if not window.more:
            break
    assert sorted(seen) == list(range(1010))
    assert seen[:1000] == order
    assert len(sizes) > 4, "the large ones do not fit into one answer"


async def test_a_full_window_of_all_namespaces_ends(events: Events, everywhere: Events) -> None:
    for n in range(5):
        await events.publish("/a", {"n": n})
    first = await everywhere.replay(limit=2)
    second = await everywhere.replay(since=TIME, limit=2)
    last = await everywhere.replay(token=second.token, limit=3)
    assert [(numbers(window), window.more) for window in (first, second, last)] == [
        ([0, 1], True), ([0, 1], True), ([2, 3, 4], False),
    ]  # fmt: skip


async def test_numbers_that_grow_on_the_wire_still_fit(events: Events) -> None:
    """In JSON `1.5` takes four bytes with its comma, in an answer's msgpack nine."""
    for n in range(5):
        await events.publish("/floats", {"n": n, "values": [1.5] * 45_000})
    seen: list[int] = []
    token = ""
    while len(seen) < 5:
        window = await events.replay(token=token)
        seen, token = seen + numbers(window), window.token
    assert seen == list(range(5))


async def test_a_token_of_a_stream_that_is_no_more(events: Events) -> None:
    await events.forward(envelope())
    token = (await events.replay()).token
    with pytest.raises(OutOfRange, match="made anew"):
        await events.replay(token=f"of-another{token[token.index('/') :]}")


async def test_a_token_behind_the_streams_end(events: Events) -> None:
    await events.forward(envelope())
    epoch = (await events.stream()).epoch
    with pytest.raises(OutOfRange, match="ends 1 events before"):
        await events.replay(token=f"{epoch}/2/")


async def test_a_token_of_a_place_where_another_event_is_now(events: Events) -> None:
    """The stream lost its end and grew again: the number is there, the event that was read is not."""
    await events.forward(envelope())
    epoch, number, digest = (await events.replay()).token.split("/")
    with pytest.raises(OutOfRange, match="lost the event that this token stands on"):
        await events.replay(token=f"{epoch}/{number}/{'0' * len(digest)}")


@pytest.mark.parametrize("place", ["", "x/", "-1/", "1.0/", "²/", "9" * 40 + "/", "0", "0/abc"])
async def test_what_is_no_token(events: Events, place: str) -> None:
    epoch = (await events.stream()).epoch
    with pytest.raises(InvalidArgument, match="token"):
        await events.replay(token=f"{epoch}/{place}")


async def test_each_event_has_its_own_token(events: Events) -> None:
    for n in range(4):
        await events.forward(envelope(n))
    window = await events.replay()
    assert [numbers(await events.replay(token=t)) for t in window.tokens] == [[1, 2, 3], [2, 3], [3], []]
    assert window.tokens[-1] == window.token == (await events.stream()).token


async def test_a_replay_ends_at_a_time(events: Events) -> None:
    await events.forward(envelope(0))
    await asyncio.sleep(0.01)
    cut = datetime.now(UTC)
    await asyncio.sleep(0.01)
    await events.forward(envelope(1))
    window = await events.replay(until=cut)
    assert (numbers(window), window.more) == ([0], False)
    assert numbers(await events.replay(since=cut, until=cut + timedelta(hours=1))) == [1]
    assert numbers(await events.replay(token=window.token)) == [1]
    with pytest.raises(InvalidArgument, match=r"zone|tzinfo"):
        await events.replay(until=datetime(2024, 1, 1))


async def test_values_that_json_does_not_have_are_refused(events: Events) -> None:
    for value in (float("nan"), float("inf"), b"\xff"):
        with pytest.raises(InvalidArgument, match="JSON"):
            await events.publish("/a", {"n": {"deep": [value]}})
    assert (await events.stream()).last == 0
    await events.publish("/a", {"text": "NaN and Infinity"})


async def test_what_is_forwarded_has_an_id_a_time_and_a_node(events: Events) -> None:
    for bad in (
        {"id": "line\nbreak"}, {"id": "ü"}, {"id": " "}, {"id": "a "}, {"id": " a"}, {"node": "a b"},
        {"timestamp": TIME.replace(tzinfo=None)}, {"timestamp": datetime(1, 1, 1, tzinfo=UTC)},
    ):  # fmt: skip
        with pytest.raises(InvalidArgument):
            await events.forward(envelope().model_copy(update=bad))
    assert (await events.stream()).last == 0


async def test_one_subscription_sees_the_ends_on_every_node(house: Bus) -> None:
    """Across nodes it is the bus that carries them: one pattern, `wherry.ev.v1.*.<ns>.tasks.exit`."""
    async with await house.subscribe(namespace="default", topic="/tasks/exit") as exits, asyncio.timeout(PATIENCE):
        operator = house.transport if not isinstance(house, HouseBus) else await house.server.operator()
        for number, (node, namespace, topic) in enumerate(
            [("n1", "default", "/tasks/exit"), ("n2", "default", "/tasks/start"), ("n2", "other", "/tasks/exit"),
             ("n.3", "default", "/tasks/exit")]
        ):  # fmt: skip
            happened = envelope(number, namespace=namespace, topic=topic)
            operator.publish(subjects.event(node, namespace, topic), encode(happened))
        assert numbers([await anext(exits) for _ in range(2)]) == [0, 3]
        if operator is not house.transport:
            await operator.close()


async def test_what_a_caller_publishes_stands_in_the_stream_as_any_envelope_does(house: Bus, events: Events) -> None:
    event = {"a": [1, None, True, 2.5], "when": TIME, "nested": {"text": 'ü "\n'}, "raw": b"text", "big": 2**60}
    made = await events.publish("/my.app/made", event)
    (stored,) = await (await log_of(house)).read()
    assert stored.data == encode(made)
    assert made.event == event
    assert (made.namespace, made.topic, made.node) == ("default", "/my.app/made", house.node)


async def test_two_read_what_one_subscriber_hears(house: Bus, events: Events) -> None:
    async with await house.subscribe() as heard, asyncio.timeout(PATIENCE):
        readers = [asyncio.ensure_future(anext(heard)) for _ in range(3)]
        await asyncio.sleep(0.01)
        readers[0].cancel()
        await asyncio.sleep(0.01)
        made = [await events.publish("/a", {"n": n}) for n in range(3)]
        assert [await readers[1], await readers[2], await anext(heard)] == made


async def test_a_slow_subscriber_is_told_and_catches_up_by_its_token(house: Bus, events: Events) -> None:
    start = (await events.stream()).token
    async with await house.subscribe(limit=50) as slow, await house.subscribe() as quick, asyncio.timeout(PATIENCE):
        for first in range(0, 400, 50):
            await asyncio.gather(*(events.forward(envelope(n)) for n in range(first, first + 50)))
        order = numbers([await anext(quick) for _ in range(400)])
        assert sorted(order) == list(range(400)), "the slow one costs the other nothing"
        await house.transport.flush()  # what the quick one has is on its way to the slow one
        assert numbers([await anext(slow) for _ in range(50)]) == order[:50]
        with pytest.raises(ResourceExhausted, match="350 events missed"):
            await anext(slow)
    assert numbers(await events.replay(token=start, limit=1000)) == order


async def test_subscribers_see_the_order_of_the_stream(house: Bus, events: Events) -> None:
    other = house.proxy(Events, namespace="other")
    async with (
        await house.subscribe() as one,
        await house.subscribe(namespace="default") as two,
        await house.subscribe(namespace="default", topic="/tasks/exit") as three,
        asyncio.timeout(PATIENCE),
    ):
        for n in range(60):
            topic = "/tasks/exit" if n % 2 else "/tasks/start"
            namespace, proxy = ("other", other) if n % 3 == 0 else ("default", events)
            await proxy.forward(envelope(n, namespace=namespace, topic=topic))
        assert numbers([await anext(one) for _ in range(60)]) == list(range(60))
        own = [n for n in range(60) if n % 3]
        assert numbers([await anext(two) for _ in own]) == own
        exits = [n for n in own if n % 2]
        assert numbers([await anext(three) for _ in exits]) == exits
    assert numbers(await house.proxy(Events).replay()) == list(range(60))
