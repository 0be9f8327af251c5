"""What a call has to be on every transport: bounded, dated, once in its effect, and never lost with its service."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from housebus import PATIENCE, HouseBus, HouseServer
from toys import SCHEMA, Toy, Toys, ask, code, nobody_answers, subject
from wherry_shared import context
from wherry_shared.bus import Bus, credentials, proxy, serve
from wherry_shared.bus.proxy import ERROR, at_instance
from wherry_shared.bus.transport import Message
from wherry_shared.contract import unpack
from wherry_shared.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WherryError,
)
from wherry_shared.sqlite import Database


@pytest.fixture
async def databases(tmp_path: Path) -> AsyncIterator[Callable[[], Awaitable[Database]]]:
    """Connections to one database."""
    made: list[Database] = []

    async def open() -> Database:
        made.append(await Database.open(tmp_path / "toys.db", SCHEMA))
        return made[-1]

    yield open
    for database in made:
        await database.close()


SOON = (0.2, 2.0, 20.0)
"""Seconds to a deadline that passes while a request runs: the longer ones where the machine took a shorter to begin."""


# ---- requests run side by side, within bounds


async def test_requests_overlap(toy: Toy, toys: Toys) -> None:
    calls = [asyncio.create_task(toys.pass_gate("a")) for _ in range(20)]
    await toy.until("began", 20)
    assert (toy.inside, toy.seen["ended"]) == (20, 0)
    assert (await toys.tell("quick"))["word"] == "quick"
    toy.gate("a").set()
    assert await asyncio.gather(*calls) == ["a"] * 20


async def test_the_bound_and_what_is_beyond_the_backlog(
    bus: Bus, toy: Toy, toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "RUNNING_MAX", 4)
    monkeypatch.setattr(serve, "BACKLOG_MAX", 3)
    calls = [asyncio.create_task(toys.pass_gate("a")) for _ in range(7)]
    await toy.until("began", 4)
    await bus.transport.flush()
    with pytest.raises(ResourceExhausted, match="image: too many requests"):
        while True:  # the first ones may overtake the last of the seven
            await asyncio.wait_for(toys.tell(), 5)
    assert toy.seen["began"] == 4
    toy.gate("a").set()
    assert await asyncio.gather(*calls) == ["a"] * 7
    assert toy.most == 4
    assert (await toys.tell("again"))["word"] == "again"


async def test_the_backlog_is_bounded_in_bytes_too(
    bus: Bus, toy: Toy, toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "RUNNING_MAX", 1)
    monkeypatch.setattr(serve, "BACKLOG_BYTES", 10_000)
    first = asyncio.create_task(toys.pass_gate("a"))
    await toy.until("began")
    calls = [asyncio.create_task(toys.tell("x" * 4000)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted):
        await toys.tell("y" * 4000)
    small = asyncio.create_task(toys.tell("small"))
    toy.gate("a").set()
    await asyncio.gather(first, small, *calls)


async def test_who_waits_takes_no_place(toy: Toy, toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "RUNNING_MAX", 1)
    monkeypatch.setattr(serve, "WAITS_MAX", 5)
    calls = [asyncio.create_task(toys.wait("a")) for _ in range(5)]
    await toy.until("began", 5)
    assert (await toys.tell("quick"))["word"] == "quick"
    with pytest.raises(ResourceExhausted):
        await toys.wait("a")
    toy.gate("a").set()
    assert await asyncio.gather(*calls) == ["a"] * 5


async def test_one_tenant_leaves_room_for_others(house_server: HouseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 requests that take their time, which cost nothing, had a service answer nobody on the node."""
    for bound in ("RUNNING_MAX", "WAITS_MAX"):
        monkeypatch.setattr(serve, bound, 8)
    monkeypatch.setattr(serve, "BACKLOG_MAX", 16)
    bus, tenant = await house_server.bus(), await house_server.connect(credentials.tenant("default"))
    try:
        toy = Toy()
        await bus.serve(toy)
        hostile, toys = tenant.proxy(Toys, namespace="default"), bus.proxy(Toys, namespace="default")
        calls = [asyncio.create_task(hostile.pass_gate("a")) for _ in range(2 + 4)]
        waits = [asyncio.create_task(hostile.wait("b")) for _ in range(2)]
        await toy.until("began", 4)
        for one_more in (hostile.tell(), hostile.wait("b")):
            with pytest.raises(ResourceExhausted, match="too many requests"):
                await one_more
        others = [asyncio.create_task(toys.wait("b")) for _ in range(6)]
        assert (await toys.tell("quick"))["word"] == "quick"
        await toy.until("began", 10)
        toy.gate("b").set()
        assert await asyncio.gather(*waits, *others) == ["b"] * 8
        assert toy.inside == 2, "of a tenant's a fourth runs, and what is over that waits for its own"
        toy.gate("a").set()
        assert await asyncio.gather(*calls) == ["a"] * 6
    finally:
        await tenant.close()
        await bus.close()


# ---- deadlines and cancellation


async def test_the_service_cancels_what_is_late(toy: Toy, toys: Toys) -> None:
    for seconds in SOON:
        with context.use(timeout=seconds), pytest.raises(DeadlineExceeded):
            await toys.pass_gate("a")
        if toy.seen["began"]:
            break
    await toy.until("cancelled", toy.seen["began"] or 1)
    assert (toy.inside, toy.seen["ended"]) == (0, 0)


async def test_the_service_says_that_the_deadline_passed(bus: Bus, toy: Toy) -> None:
    for seconds in SOON:
        answer = await ask(bus, "pass_gate", {"name": "a"}, deadline=f"{time.time() + seconds:.3f}")
        if toy.seen["began"]:
            break
    assert (code(answer), (answer.headers or {})[ERROR]) == (4, "image.pass_gate: the deadline passed")


async def test_a_late_request_is_not_begun(bus: Bus, toy: Toy, toys: Toys) -> None:
    """Who goes by another clock hears of it, and does not wait for an answer that never comes."""
    answer = await ask(bus, "add", {"name": "x"}, deadline=f"{time.time() - 70:.3f}")
    assert code(answer) == 4
    late = re.search(r"the deadline was (\d+\.\d) s before", (answer.headers or {})[ERROR])
    assert late and 69 < float(late[1]) < 70 + PATIENCE
    await toys.tell()
    assert toy.seen["add"] == 0


async def test_what_becomes_late_in_the_backlog_never_runs(
    toy: Toy, toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "RUNNING_MAX", 1)
    first = asyncio.create_task(toys.pass_gate("a"))
    await toy.until("began")
    with context.use(timeout=0.1), pytest.raises(DeadlineExceeded):
        await toys.add("x")
    toy.gate("a").set()
    await first
    assert (await toys.tell("next"))["word"] == "next"
    assert toy.seen["add"] == 0


async def test_a_deadline_that_no_timer_can_be_set_to(bus: Bus, toy: Toy) -> None:
    assert code(await ask(bus, "tell", deadline="1e300")) == 0
    assert toy.contexts[-1].deadline < time.time() + 2 * serve.DEADLINE_MAX


@pytest.mark.parametrize("deadline", ["soon", "nan", "inf", "-inf", "-1", "1e400", ""])
async def test_nonsense_for_a_deadline(bus: Bus, toy: Toy, deadline: str) -> None:
    answer = await ask(bus, "tell", deadline=deadline)
    assert (code(answer), toy.seen["tell"]) == (3, 0)


async def test_a_deadline_is_never_moved_outwards(toys: Toys, toy: Toy) -> None:
    with context.use(timeout=5), context.use(timeout=60):
        await toys.tell()
    assert toy.contexts[0].remaining(0) <= 5.001
    await toys.tell()
    assert 5 < toy.contexts[1].remaining(0) <= 10.001


async def test_cancelling_a_call_leaves_nothing_behind(bus: Bus, toy: Toy, toys: Toys) -> None:
    call = asyncio.create_task(toys.pass_gate("a"))
    await toy.until("began")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    toy.gate("a").set()
    await toy.until("ended")  # the service was not told: it ends what it began, or is stopped by the deadline
    assert (await toys.tell("x"))["word"] == "x"


async def test_a_timeout_of_the_services_own_is_not_the_callers_deadline(toys: Toys, toy: Toy) -> None:
    with pytest.raises(Internal, match=r"^image\.fail: internal error, see the service's log$"):
        await toys.fail(101, "some socket")


async def test_work_that_was_cancelled_under_the_service_is_its_own_trouble(toys: Toys, toy: Toy) -> None:
    with pytest.raises(Internal):
        await toys.fail(102, "")


# ---- one effect


async def deliver(bus: Bus, times: int, method: str, body: Any, key: str) -> list[Message]:
    return list(await asyncio.gather(*(ask(bus, method, body, key=key) for _ in range(times))))


async def test_three_deliveries_have_one_effect_and_equal_answers(bus: Bus, toy: Toy) -> None:
    calls = asyncio.create_task(deliver(bus, 3, "enter", {"name": "a"}, "k"))
    await toy.until("began")
    toy.gate("a").set()
    answers = await calls
    assert ([unpack(a.data) for a in answers], toy.seen["add"]) == ([1, 1, 1], 1)
    assert [unpack(a.data) for a in await deliver(bus, 2, "enter", {"name": "a"}, "k")] == [1, 1]
    assert [unpack(a.data) for a in await deliver(bus, 1, "enter", {"name": "a"}, "other")] == [2]
    assert toy.seen["began"] == 2


async def test_two_members_of_a_queue_on_one_database(bus: Bus, databases: Callable[[], Awaitable[Database]]) -> None:
    members = [Toy(await databases()) for _ in range(2)]
    for member in members:
        await bus.serve(member)
    rounds = 0
    while not all(m.seen["add"] for m in members) or rounds < 8:
        rounds += 1
        answers = await deliver(bus, 3, "add", {"name": f"n{rounds}", "slow": True}, f"key{rounds}")
        assert [(code(a), unpack(a.data)) for a in answers] == [(0, 1)] * 3
        assert rounds < 60, "the same member got everything"
    database = await databases()
    assert [tuple(r) for r in database.all("SELECT count(*), sum(n) FROM things")] == [(rounds, rounds)]


async def test_a_key_outlives_the_service(bus: Bus, databases: Callable[[], Awaitable[Database]]) -> None:
    toys = bus.proxy(Toys, namespace="default")
    database = await databases()
    await bus.serve(Toy(database))
    with context.use(key="once"):
        assert await toys.add("a") == 1
    assert await toys.add("a") == 2
    await bus.drain()
    await database.close()
    again = Toy(await databases())
    await bus.serve(again)
    with context.use(key="once"):
        assert await toys.add("a") == 1
        assert await toys.add("a") == 1
    assert (again.seen["add"], await toys.add("a")) == (1, 3)


async def test_a_key_is_its_methods_and_its_namespaces(bus: Bus, toy: Toy) -> None:
    with context.use(key="k"):
        assert await bus.proxy(Toys, namespace="a").add("x") == 1
        assert await bus.proxy(Toys, namespace="b").add("x") == 2
    assert code((await deliver(bus, 1, "add", {"name": "x"}, "k" * 129))[0]) == 3
    assert toy.seen["add"] == 2


async def test_errors_are_kept_under_the_key_unless_they_pass(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    class Moody(Toy):
        mood: WherryError | None = None

        async def add(self, name: str, slow: bool = False) -> int:
            self.seen["add"] += 1
            if self.mood is not None:
                raise self.mood
            return self.seen["add"]

    moody, toys = Moody(), bus.proxy(Toys, namespace="default")
    await bus.serve(moody)
    moods = (AlreadyExists("taken"), False), (Unavailable("locked"), True), (ResourceExhausted("full"), True)
    for error, again in moods:
        moody.seen.clear()
        with context.use(key=type(error).__name__):
            moody.mood = error
            with pytest.raises(type(error), match=error.message):
                await toys.add("x")
            moody.mood = None
            if again:
                assert await toys.add("x") == 2
            else:
                with pytest.raises(type(error), match=error.message):
                    await toys.add("x")
                assert moody.seen["add"] == 1


async def test_what_a_service_calls_has_keys_of_its_own(bus: Bus) -> None:
    """The request's key names its own effect: two calls made under it are two calls, in the longest namespace too."""

    class Pair(Toy):
        async def add(self, name: str, slow: bool = False) -> int:
            toys = bus.proxy(Toys, namespace="n" * 76)
            return 10 * await toys.enter("a") + await toys.enter("b")

        async def enter(self, name: str) -> int:
            self.seen["enter"] += 1
            return self.seen["enter"]

    await bus.serve(Pair())
    with context.use(key="k"):
        assert await bus.proxy(Toys, namespace="n" * 76).add("x") == 12


async def test_a_repeated_wait_joins_the_first(bus: Bus, toy: Toy, toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "LAST_ATTEMPT", 0.1)
    call = asyncio.create_task(toys.wait("a"))
    await toy.until("began")
    await asyncio.sleep(0.5)
    assert toy.seen["began"] == 1
    toy.gate("a").set()
    assert await call == "a"


# ---- nobody there, or not any more


async def test_a_service_that_appears_later(bus: Bus, toys: Toys) -> None:
    call = asyncio.create_task(toys.tell("early"))
    await asyncio.sleep(0.1)
    assert not call.done()
    await bus.serve(Toy())
    assert (await call)["word"] == "early"


async def test_nobody_at_all(toys: Toys) -> None:
    await nobody_answers(toys.tell)


async def test_a_request_that_got_lost_is_sent_again(bus: Bus, toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that takes a request and dies is, to its caller, one that says nothing."""
    monkeypatch.setattr(proxy, "FIRST_ATTEMPT", 0.1)
    place = await bus.of("image") if isinstance(bus, HouseBus) else bus
    taken = asyncio.Event()
    dead = await place.transport.subscribe(subject(bus, "add", "*"), lambda message: taken.set(), queue="image")
    call = asyncio.create_task(toys.add("x"))
    await taken.wait()
    await dead.unsubscribe()
    toy = Toy()
    await bus.serve(toy)
    assert (await call, toy.seen["add"]) == (1, 1)


async def test_drain_ends_what_runs_and_sends_the_rest_elsewhere(
    bus: Bus, toy: Toy, toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "RUNNING_MAX", 2)
    running = [asyncio.create_task(toys.pass_gate("a")) for _ in range(2)]
    await toy.until("began", 2)
    waiting = [asyncio.create_task(toys.tell(str(n))) for n in range(3)]
    waits = asyncio.create_task(toys.wait("b"))
    await toy.until("began", 3)
    draining = asyncio.create_task(bus.drain(PATIENCE))
    await toy.until("cancelled")  # who only waits is sent away at once
    assert not any(call.done() for call in running)
    other = Toy()
    other.gate("b").set()
    await bus.serve(other)
    assert [(await call)["word"] for call in waiting] == ["0", "1", "2"]
    assert await waits == "b"
    assert (other.seen["tell"], toy.seen["tell"]) == (3, 0)
    toy.gate("a").set()
    assert await asyncio.gather(*running) == ["a", "a"]
    await draining
    assert other.seen["began"] == 1


async def test_drain_gives_up_on_what_does_not_end(bus: Bus, toy: Toy, toys: Toys) -> None:
    call = asyncio.create_task(toys.enter("a"))
    await toy.until("began")
    await bus.drain(0.05)
    assert (toy.seen["cancelled"], toy.inside) == (1, 0)
    other = Toy()
    other.gate("a").set()
    await bus.serve(other)
    assert await call == 1


async def test_a_drained_service_answers_nothing_more(bus: Bus, toy: Toy, toys: Toys) -> None:
    await toys.tell()
    await bus.drain()
    await nobody_answers(toys.tell)
    assert toy.seen["tell"] == 1


async def test_one_instance_of_several(bus: Bus, toys: Toys) -> None:
    replicas = {name: Toy() for name in ("one", "two", "three")}
    servers = {name: await bus.serve(replica, instance=name) for name, replica in replicas.items()}
    for _ in range(5):
        await at_instance(toys, "two").tell()
        await bus.proxy(Toys, namespace="default", instance="three").tell()
    assert [replicas[n].seen["tell"] for n in ("one", "two", "three")] == [0, 5, 5]
    await servers["two"].drain()
    with pytest.raises(Unavailable, match="its instance two is gone"):
        await at_instance(toys, "two").tell()
    await asyncio.gather(*(toys.tell() for _ in range(200)))
    assert replicas["one"].seen["tell"] > 0
    assert replicas["two"].seen["tell"] == 5
    assert replicas["one"].seen["tell"] + replicas["three"].seen["tell"] == 205
    for bad in ("*", ">", "a b", "a.", "x\r\ny"):
        with pytest.raises(InvalidArgument):
            await at_instance(toys, bad).tell()


async def test_what_is_immediate_is_answered_without_a_task_and_sees_its_namespace(toy: Toy, toys: Toys) -> None:
    before = context.current()
    assert await toys.now("a") == "default a"
    with pytest.raises(NotFound, match="no b"):
        await toys.now("b")
    assert context.current() == before


async def test_what_is_immediate_and_waits_all_the_same_is_a_bug_and_told(toy: Toy, toys: Toys) -> None:
    with pytest.raises(Internal, match=r"image\.now"):
        await toys.now("wait")
    assert await toys.now("a") == "default a"
