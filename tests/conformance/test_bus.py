"""What a call has to be on every transport: bounded, dated, once in its effect, and honest about what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import msgpack
import pytest
from housebus import HouseBus
from wherry_shared import context
from wherry_shared.bus import Bus, proxy, serve, subjects
from wherry_shared.bus.proxy import DEADLINE, ERROR, ERROR_CODE, KEY, LEASE, RETRY, at_instance
from wherry_shared.bus.transport import Message
from wherry_shared.contract import Contract, endpoint, pack, unpack
from wherry_shared.errors import (
    ERRORS,
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    WherryError,
)
from wherry_shared.memory import MemoryTransport
from wherry_shared.sqlite import Database, Transaction
from wherry_shared.values import Name

SCHEMA = ("CREATE TABLE things (name TEXT PRIMARY KEY, n INTEGER NOT NULL)",)


class Toys(Contract, Protocol, service="image", version="1.2.3"):
    """A little of everything."""

    @endpoint()
    async def tell(self, word: str = "", anything: Any = None) -> dict[str, Any]:
        """What the service sees of the call."""
        ...

    @endpoint()
    async def pass_gate(self, name: Name) -> str:
        """Wait until the gate is opened."""
        ...

    @endpoint(waits=True)
    async def wait(self, name: Name) -> str:
        """Wait until the gate is opened, among those that wait."""
        ...

    @endpoint(AlreadyExists, mutates=True)
    async def add(self, name: Name, slow: bool = False) -> int:
        """Count."""
        ...

    @endpoint(AlreadyExists, mutates=True)
    async def enter(self, name: Name) -> int:
        """Count behind the gate."""
        ...

    @endpoint(*ERRORS.values())
    async def fail(self, code: int, message: str) -> None:
        """Fail."""
        ...

    @endpoint()
    async def fill(self, size: int) -> bytes:
        """So many bytes."""
        ...


class Toy(Toys):
    """Serves Toys; what it did is in `seen`, how many did it at once in `most`."""

    def __init__(self, database: Database | None = None) -> None:
        self.database = database
        self.gates: dict[str, asyncio.Event] = {}
        self.seen: Counter[str] = Counter()
        self.inside = self.most = 0
        self.contexts: list[context.Context] = []

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def until(self, what: str, times: int = 1) -> None:
        """Wait until something was seen so often."""
        async with asyncio.timeout(10):
            while self.seen[what] < times:
                await asyncio.sleep(0.001)

    async def tell(self, word: str = "", anything: Any = None) -> dict[str, Any]:
        self.seen["tell"] += 1
        now = context.current()
        self.contexts.append(now)
        return {"word": word, "anything": anything, "namespace": now.namespace, "lease": now.lease, "trace": now.trace}

    async def pass_gate(self, name: str) -> str:
        self.seen["began"] += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await self.gate(name).wait()
            self.seen["ended"] += 1
            return name
        except asyncio.CancelledError:
            self.seen["cancelled"] += 1
            raise
        finally:
            self.inside -= 1

    async def wait(self, name: str) -> str:
        return await self.pass_gate(name)

    async def add(self, name: str, slow: bool = False) -> int:
        self.seen["add"] += 1
        if self.database is None:
            await asyncio.sleep(0)
            return self.seen["add"]

        def write(tx: Transaction) -> int:
            if slow:
                time.sleep(0.02)
            tx.execute("INSERT INTO things VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET n = n + 1", (name,))
            n: int = tx.one("SELECT n FROM things WHERE name = ?", (name,))[0]
            return n

        return await self.database.mutate(write)

    async def enter(self, name: str) -> int:
        await self.pass_gate(name)
        return await self.add(name)

    async def fail(self, code: int, message: str) -> None:
        if code in ERRORS:
            raise ERRORS[code](message)
        raise {100: ValueError, 101: TimeoutError, 102: asyncio.CancelledError, 103: RecursionError}[code](message)

    async def fill(self, size: int) -> bytes:
        return b"\xa5" * size


@pytest.fixture
async def toy(bus: Bus) -> Toy:
    made = Toy()
    await bus.serve(made)
    return made


@pytest.fixture
def toys(bus: Bus) -> Toys:
    return bus.proxy(Toys, namespace="default")


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


def subject(bus: Bus, method: str, namespace: str = "default") -> str:
    return f"{subjects.RPC}.{bus.node}.{namespace}.image.{method}"


async def ask(bus: Bus, method: str, body: Any = None, *, namespace: str = "default", **headers: str) -> Message:
    """A request by hand. Headers are given as key=, deadline= and so on."""
    names = {"key": KEY, "deadline": DEADLINE, "lease": LEASE}
    data = body if isinstance(body, bytes) else pack(body or {})
    return await bus.transport.request(
        subject(bus, method, namespace), data, headers={names[k]: v for k, v in headers.items()}, timeout=10.0
    )


def code(answer: Message) -> int:
    return int((answer.headers or {}).get(ERROR_CODE, "0"))


class Tap:
    """Every message on the bus under `wherry.`, requests and events alike."""

    def __init__(self) -> None:
        self.subjects: list[str] = []

    def __call__(self, message: Message) -> None:
        self.subjects.append(message.subject)


@contextlib.asynccontextmanager
async def tapped(bus: Bus) -> AsyncIterator[Tap]:
    tap = Tap()
    if isinstance(bus, HouseBus):
        transport: Any = await bus.server.operator()
    else:
        assert isinstance(bus.transport, MemoryTransport)
        transport = MemoryTransport(bus.transport.broker)
    await transport.subscribe("wherry.>", tap)
    yield tap
    # What is asked for now comes after all that was asked for before.
    await ask(bus, "tell", {"word": "last"})
    await transport.flush()
    await transport.close()


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
    calls = [asyncio.create_task(toys.pass_gate("a"))]
    await toy.until("began")
    calls += [asyncio.create_task(toys.tell("x" * 4000)) for _ in range(2)]  # type: ignore[list-item]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted):
        await toys.tell("y" * 4000)
    small = asyncio.create_task(toys.tell("small"))
    toy.gate("a").set()
    await asyncio.gather(*calls, small)


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


# ---- deadlines and cancellation


async def test_the_service_cancels_what_is_late(toy: Toy, toys: Toys) -> None:
    with context.use(timeout=0.2), pytest.raises(DeadlineExceeded):
        await toys.pass_gate("a")
    await toy.until("cancelled")
    assert (toy.inside, toy.seen["ended"]) == (0, 0)


async def test_the_service_says_that_the_deadline_passed(bus: Bus, toy: Toy) -> None:
    answer = await ask(bus, "pass_gate", {"name": "a"}, deadline=f"{time.time() + 0.1:.3f}")
    assert (code(answer), (answer.headers or {})[ERROR]) == (4, "image.pass_gate: the deadline passed")


async def test_a_late_request_is_dropped(bus: Bus, toy: Toy, toys: Toys) -> None:
    with pytest.raises(DeadlineExceeded):
        await bus.transport.request(
            subject(bus, "add"), pack({"name": "x"}), headers={DEADLINE: f"{time.time() - 0.01:.3f}"}, timeout=0.1
        )
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


async def test_two_members_of_a_queue_on_one_database(
    bus: Bus, databases: Callable[[], Awaitable[Database]]
) -> None:
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


async def test_errors_are_kept_under_the_key_unless_they_pass(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Moody(Toy):
        mood: WherryError | None = None

        async def add(self, name: str, slow: bool = False) -> int:
            self.seen["add"] += 1
            if self.mood is not None:
                raise self.mood
            return self.seen["add"]

    moody, toys = Moody(), bus.proxy(Toys, namespace="default")
    await bus.serve(moody)
    for error, again in ((AlreadyExists("taken"), False), (Unavailable("locked"), True), (ResourceExhausted("full"), True)):
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


async def test_what_a_service_calls_has_keys_of_its_own(bus: Bus, toy: Toy) -> None:
    """The request's key names its own effect: two calls made under it are two calls, in the longest namespace too."""

    class Outer(Toy):
        async def add(self, name: str, slow: bool = False) -> int:
            inner = bus.proxy(Toys, node="n1")
            return await inner.enter(name) + await inner.enter(name)

    class Pair(Toy):
        async def add(self, name: str, slow: bool = False) -> int:
            toys = bus.proxy(Toys, namespace="n" * 76)
            return 10 * await toys.enter("a") + await toys.enter("b")

        async def enter(self, name: str) -> int:
            self.seen["enter"] += 1
            return self.seen["enter"]

    await bus.drain()
    await bus.serve(Pair())
    with context.use(key="k"):
        assert await bus.proxy(Toys, namespace="n" * 76).add("x") == 12


async def test_a_repeated_wait_joins_the_first(
    bus: Bus, toy: Toy, toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "LAST_ATTEMPT", 0.1)
    call = asyncio.create_task(toys.wait("a"))
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
    with context.use(timeout=0.1), pytest.raises(Unavailable, match=r"image\.tell: no service answers on the bus"):
        await toys.tell()


async def test_a_request_that_got_lost_is_sent_again(
    bus: Bus, toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    draining = asyncio.create_task(bus.drain(5.0))
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
    with context.use(timeout=0.1), pytest.raises(Unavailable):
        await toys.tell()
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


# ---- errors


MESSAGES = [
    "", "plain", "zwei\nZeilen", "über 日本 \U0001f680", " blanks around ", "tab\tand\r\nnul\0", "x" * 5000,
    "line" * 400 + "\n" + "tail", "\x1b[31mred", "Nats-Service-Error-Code: 7",
]  # fmt: skip


@pytest.mark.parametrize("number", sorted(ERRORS))
async def test_every_class_arrives_as_itself(toy: Toy, toys: Toys, number: int) -> None:
    for message in MESSAGES:
        with pytest.raises(WherryError) as caught:
            await toys.fail(number, message)
        assert type(caught.value) is ERRORS[number]
        assert caught.value.message == (message or ERRORS[number].__name__)


async def test_the_header_has_one_line_for_any_tool(bus: Bus, toy: Toy) -> None:
    answer = await ask(bus, "fail", {"code": 5, "message": "not\r\nthere"})
    assert (answer.headers or {})[ERROR] == "not  there"
    assert answer.data == b"not\r\nthere"
    assert (await ask(bus, "fail", {"code": 5, "message": "nowhere"})).data == b""


@pytest.mark.parametrize("number", [100, 103])
async def test_a_bug_tells_nothing_of_itself(
    bus: Bus, toy: Toy, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await ask(bus, "fail", {"code": number, "message": "secret words"})
    assert (code(answer), answer.data) == (13, b"")
    assert "secret" not in str(answer.headers)
    assert "secret words" in caplog.text  # its log has them


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
async def test_a_wrong_answer_is_a_bug_of_the_service(bus: Bus) -> None:
    class Wrong(Toy):
        async def tell(self, word: str = "", anything: Any = None) -> Any:
            return {"x": object()}

        async def add(self, name: str, slow: bool = False) -> Any:
            return "many"

    await bus.serve(Wrong())
    toys = bus.proxy(Toys, namespace="default")
    with pytest.raises(Internal):
        await toys.tell()
    with pytest.raises((DataLoss, Internal)):
        await toys.add("x")


async def test_unknown_methods(bus: Bus, toy: Toy) -> None:
    for method in ("rename", "*", ">", "__init__", "until", "x" * 300):
        answer = await ask(bus, method)
        assert code(answer) == 12, method
    assert "rename" in str((await ask(bus, "rename")).headers)


async def test_a_contract_that_is_not_implemented_whole_is_not_served(bus: Bus) -> None:
    class Half(Toys):
        async def tell(self, word: str = "", anything: Any = None) -> dict[str, Any]:
            return {}

    half: Any = Half
    with pytest.raises(Unimplemented, match=r"Half does not implement image\.pass_gate"):
        await bus.serve(half())
    with context.use(timeout=0.05), pytest.raises(Unavailable):
        await bus.proxy(Toys, namespace="default").tell()


async def test_what_no_operation_takes_is_refused_before_it_is_sent(bus: Bus, toy: Toy, toys: Toys) -> None:
    anything: Any = toys
    for call in (
        lambda: anything.tell("a", None, "b"), lambda: anything.tell(wrod="a"), lambda: anything.tell("a", word="b"),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            await call()
    deep: Any = []
    for _ in range(3000):
        deep = [deep]
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    for call in (
        lambda: anything.tell(5), lambda: anything.pass_gate(""), lambda: anything.pass_gate(),
        lambda: anything.tell("", object()), lambda: anything.tell("", deep), lambda: anything.tell("", cyclic),
        lambda: anything.tell("", 1 << 70), lambda: anything.tell("", "\ud800"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=r"^image\.(tell|pass_gate): "):
            await call()
    assert not toy.seen


# ---- namespaces


BAD = [
    "*", ">", "a b", "a\r\nb", "a\nPUB x 0\r\n", "\0", "a\0", "a..b", ".a", "a.", "-a", "a-", "a--b", "a._b", "n" * 77,
    "ｋ８ｓ", "kе8s", "a/b", "a~b", "_", "a_", "$SYS", "a\tb", "ä", " ", "a\u2028b",
]  # fmt: skip


async def test_invalid_namespaces_never_reach_the_bus(bus: Bus, toy: Toy) -> None:
    async with tapped(bus) as tap:
        for namespace in BAD:
            with pytest.raises((InvalidArgument, FailedPrecondition)):
                await bus.proxy(Toys, namespace=namespace).tell()
            with context.use(namespace=namespace), pytest.raises((InvalidArgument, FailedPrecondition)):
                await bus.proxy(Toys).tell()
        with pytest.raises(FailedPrecondition, match=r"image\.tell: namespace is required"):
            await bus.proxy(Toys).tell()
    assert [s for s in tap.subjects if s.startswith("wherry.")] == [subject(bus, "tell")]
    assert toy.seen["tell"] == 1


async def test_tokens_are_validated_again_by_the_service(bus: Bus, toy: Toy) -> None:
    """Whoever may publish under a prefix may also publish what no proxy would."""
    for token in ("*", ">", "a--b", "-", "~", "a~", "n" * 77, "$SYS", "é", "_"):
        answer = await ask(bus, "tell", namespace=token)
        assert (code(answer), toy.seen["tell"]) == (3, 0), token


async def test_namespaces_with_dots(bus: Bus, toy: Toy) -> None:
    async with tapped(bus) as tap:
        for namespace in ("k8s.io", "k8s", "a.b", "a_b-c.d", "n" * 76, "1"):
            assert (await bus.proxy(Toys, namespace=namespace).tell())["namespace"] == namespace
            with context.use(namespace=namespace):
                assert (await bus.proxy(Toys).tell())["namespace"] == namespace
    assert {s.split(".")[4] for s in tap.subjects if s.startswith("wherry.")} >= {"k8s~io", "k8s", "a~b"}
    assert all(s.count(".") == 6 for s in tap.subjects if s.startswith("wherry."))


class Everywhere(Contract, Protocol, service="namespace", version="1.0.0", namespaced=False):
    """Belongs to no namespace."""

    @endpoint()
    async def where(self) -> str:
        """The namespace that the service sees."""
        ...


class Either(Contract, Protocol, service="events", version="1.0.0", namespaced=None):
    """Belongs to one, or to none."""

    @endpoint()
    async def where(self) -> str:
        """The namespace that the service sees."""
        ...


async def test_calls_that_belong_to_no_namespace(bus: Bus) -> None:
    class Here(Everywhere):
        async def where(self) -> str:
            return context.current().namespace

    class There(Either):
        async def where(self) -> str:
            return context.current().namespace

    await bus.serve(Here())
    await bus.serve(There())
    with context.use(namespace="default"):
        assert await bus.proxy(Everywhere).where() == "_"
        assert await bus.proxy(Either).where() == "default"
    assert await bus.proxy(Either).where() == "_"
    assert await bus.proxy(Either, namespace="a.b").where() == "a.b"
    answer = await bus.transport.request(f"{subjects.RPC}.n1.default.namespace.where", b"", timeout=5)
    assert code(answer) == 3


# ---- what a call carries


async def test_lease_and_trace_arrive(bus: Bus, toy: Toy, toys: Toys) -> None:
    with context.use(lease="pull 1/ü"):
        assert (await toys.tell())["lease"] == "pull 1/ü"
    assert (await toys.tell())["lease"] == ""
    answer = await bus.transport.request(
        subject(bus, "tell"), b"", headers={"traceparent": "00-abc-def-01"}, timeout=5
    )
    assert unpack(answer.data)["trace"] == "00-abc-def-01"
    for bad in ("a\r\nWherry-Key: x", "a\nb"):
        with context.use(lease=bad), pytest.raises(InvalidArgument):
            await toys.tell()


async def test_who_asks_is_known_by_the_inbox(bus: Bus, toy: Toy, toys: Toys) -> None:
    await toys.tell()
    assert toy.contexts[0].identity.is_admin


async def test_values_arrive_as_they_were(toys: Toys, toy: Toy) -> None:
    for value in (None, True, 0, -1, 1 << 63, 1.5, "", "日本", b"\0\xff", [1, [2, {"a": b"x"}]], {"k": None}, "x" * 70000):
        assert (await toys.tell("", value))["anything"] == value


# ---- bodies


async def test_a_body_over_the_limit(bus: Bus, toy: Toy, toys: Toys) -> None:
    limit = bus.transport.max_payload
    with pytest.raises(InvalidArgument, match=str(limit)):
        await toys.tell("x" * limit)
    assert not toy.seen
    assert len(await toys.fill(limit)) == limit
    with pytest.raises(ResourceExhausted, match=rf"answer of {limit + 1} bytes"):
        await toys.fill(limit + 1)
    assert (await toys.tell("y"))["word"] == "y"


def nested(kind: bytes, depth: int) -> bytes:
    return b"\x81\xa8anything" + kind * depth + b"\xc0"


MALFORMED = {
    "truncated": pack({"word": "abc"})[:-1],
    "trailing": pack({"word": "abc"}) + b"\xc0",
    "reserved byte": b"\xc1",
    "not a map": pack([1, 2]),
    "a text": pack("word"),
    "nil": b"\xc0",
    "keys of numbers": b"\x81\x01\x02",
    "keys of bytes": msgpack.packb({b"word": "x"}, use_bin_type=True),
    "wrong type": pack({"word": 5}),
    "wrong type deep": pack({"word": {"a": ["b"]}}),
    "no text": b"\x81\xa4word\xa2\xff\xfe",
    "foreign extension": b"\x81\xa4word\xd4\x05\x00",
    "huge extension": b"\x81\xa4word\xc9\x00\x0e\xff\xff\x05" + b"x" * 0xEFFFF,
    "bad timestamp": b"\x81\xa4word\xd7\xff" + b"\xff" * 8,
    "far timestamp": b"\x81\xa8anything\xc7\x0c\xff\x00\x00\x00\x00" + b"\x7f" + b"\xff" * 7,
    "ten thousand deep": nested(b"\x91", 10_000),
    "a million deep": nested(b"\x91", 1_000_000),
    "maps in maps": nested(b"\x81\xa1x", 10_000),
    "just too deep": nested(b"\x91", 100),
    "promised and not there": b"\x81\xa8anything\xdd\xff\xff\xff\xff",
    "a million lists": b"\x81\xa8anything\xdd" + (10**6).to_bytes(4, "big") + b"\x90" * 10**6,
    "a million entries": b"\x81\xa8anything\xdd" + (10**6).to_bytes(4, "big") + b"\x01" * 10**6,
    "many maps": b"\x81\xa8anything\xdd" + (60_000).to_bytes(4, "big") + b"\x81\xa1x\x80" * 60_000,
}


@pytest.mark.parametrize("kind", MALFORMED)
async def test_malformed_bodies(bus: Bus, toy: Toy, toys: Toys, kind: str) -> None:
    answer = await ask(bus, "tell", MALFORMED[kind])
    assert (code(answer), toy.seen["tell"]) == (3, 0), answer.headers
    assert (answer.headers or {})[ERROR].startswith("image.tell: ")
    assert (await toys.tell("next"))["word"] == "next"


async def test_numbers_that_are_none(bus: Bus) -> None:
    class Measured(Contract, Protocol, service="image", version="1.0.0"):
        @endpoint()
        async def measure(self, size: float) -> float:
            """A size."""
            ...

    class Ruler(Measured):
        async def measure(self, size: float) -> float:
            return size

    await bus.serve(Ruler())
    ruler = bus.proxy(Measured, namespace="default")
    assert await ruler.measure(1.5) == 1.5
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InvalidArgument):
            await ruler.measure(bad)
        assert code(await ask(bus, "measure", {"size": bad})) == 3


async def test_a_flood_of_headers(bus: Bus, toy: Toy, toys: Toys) -> None:
    flood = {f"X-{n}": "y" for n in range(50_000)}
    answer = await bus.transport.request(subject(bus, "tell"), b"", headers=flood, timeout=10)
    assert code(answer) == 0
    assert (await toys.tell("next"))["word"] == "next"


async def test_a_reply_that_no_contract_promised(bus: Bus) -> None:
    place = await bus.of("image") if isinstance(bus, HouseBus) else bus
    bodies = itertools.cycle([b"\xc1", pack([1]), pack({"a": 1})[:-1], b""])
    await place.transport.subscribe(
        subject(bus, "tell", "*"), lambda m: place.transport.publish(m.reply, next(bodies)), queue="image"
    )
    toys = bus.proxy(Toys, namespace="default")
    for _ in range(4):
        with pytest.raises(DataLoss):
            await toys.tell()


async def test_an_error_of_a_newer_version(bus: Bus) -> None:
    place = await bus.of("image") if isinstance(bus, HouseBus) else bus
    codes = itertools.cycle(["99", "abc", "²", "9" * 5000, "-1"])
    await place.transport.subscribe(
        subject(bus, "tell", "*"),
        lambda m: place.transport.publish(m.reply, b"", headers={ERROR_CODE: next(codes), ERROR: "odd", RETRY: "1"}),
        queue="image",
    )
    toys = bus.proxy(Toys, namespace="default")
    for _ in range(5):
        with pytest.raises(ERRORS[2], match="odd"):
            await toys.tell()


async def test_a_request_that_wants_no_answer_does_nothing(bus: Bus, toy: Toy, toys: Toys) -> None:
    bus.transport.publish(subject(bus, "add"), pack({"name": "x"}))
    await toys.tell()
    assert toy.seen["add"] == 0


async def test_not_found(toys: Toys, toy: Toy) -> None:
    with pytest.raises(NotFound, match="^nothing here$"):
        await toys.fail(5, "nothing here")
