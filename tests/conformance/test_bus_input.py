"""What goes over the bus on every transport: errors as they were raised, namespaces, headers, and hostile bodies."""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import pytest
from housebus import HouseBus
from toys import Toy, Toys, ask, code, nobody_answers, subject, tapped
from wherry_shared import context
from wherry_shared.bus import Bus, subjects
from wherry_shared.bus.proxy import ERROR, ERROR_CODE, RETRY
from wherry_shared.contract import Contract, endpoint, pack, unpack
from wherry_shared.errors import (
    ERRORS,
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
    WherryError,
)

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
async def test_a_bug_tells_nothing_of_itself(bus: Bus, toy: Toy, number: int, caplog: pytest.LogCaptureFixture) -> None:
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
    await nobody_answers(bus.proxy(Toys, namespace="default").tell)


async def test_what_no_operation_takes_is_refused_before_it_is_sent(bus: Bus, toy: Toy, toys: Toys) -> None:
    anything: Any = toys
    for args, kwargs in ((("a", None, "b"), {}), ((), {"wrod": "a"}), (("a",), {"word": "b"})):
        with pytest.raises(TypeError):
            await anything.tell(*args, **kwargs)
    deep: Any = []
    for _ in range(3000):
        deep = [deep]
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    for method, arguments in (
        ("tell", (5,)), ("pass_gate", ("",)), ("pass_gate", ()), ("tell", ("", object())), ("tell", ("", deep)),
        ("tell", ("", cyclic)), ("tell", ("", 1 << 70)), ("tell", ("", "\ud800")),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=r"^image\.(tell|pass_gate): "):
            await getattr(anything, method)(*arguments)
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
    answer = await bus.transport.request(subject(bus, "tell"), b"", headers={"traceparent": "00-abc-def-01"}, timeout=5)
    assert unpack(answer.data)["trace"] == "00-abc-def-01"
    for bad in ("a\r\nWherry-Key: x", "a\nb"):
        with context.use(lease=bad), pytest.raises(InvalidArgument):
            await toys.tell()


async def test_who_asks_is_known_by_the_inbox(bus: Bus, toy: Toy, toys: Toys) -> None:
    await toys.tell()
    assert toy.contexts[0].identity.is_admin


async def test_values_arrive_as_they_were(toys: Toys, toy: Toy) -> None:
    for value in (None, True, -1, 1 << 63, 1.5, "", "日本", b"\0\xff", [1, [2, {"a": b"x"}]], {"k": None}, "x" * 70000):
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
    with pytest.raises(NotFound, match=r"^nothing here$"):
        await toys.fail(5, "nothing here")
