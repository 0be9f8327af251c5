"""The receive parser and the header blocks, without a server."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wherry_shared.bus.protocol import (
    ASIDE,
    BUFFER_BYTES,
    FIRST_BYTES,
    MAX_LINE,
    Message,
    Receiver,
    encode_headers,
    parse_headers,
)
from wherry_shared.errors import InvalidArgument

Operation = tuple[object, ...]


@dataclass
class Recorder:
    """A sink that writes down what it is told."""

    seen: list[Operation] = field(default_factory=list)

    def on_message(self, sid: str, subject: str, reply: str, block: bytes | None, data: bytes) -> None:
        self.seen.append(("message", sid, subject, reply, block, data))

    def on_ping(self) -> None:
        self.seen.append(("ping",))

    def on_pong(self) -> None:
        self.seen.append(("pong",))

    def on_info(self, info: bytes) -> None:
        self.seen.append(("info", info))

    def on_error(self, text: str) -> None:
        self.seen.append(("error", text))

    def on_broken(self, reason: str) -> None:
        self.seen.append(("broken",))

    def on_lost(self, error: Exception | None) -> None:
        self.seen.append(("lost", error))

    def on_pressure(self, paused: bool) -> None:
        self.seen.append(("pressure", paused))


def wire(operation: Operation) -> bytes:
    match operation:
        case ("message", str(sid), str(subject), str(reply), block, bytes(data)):
            names = " ".join(part for part in (subject, sid, reply) if part).encode("utf-8", "surrogateescape")
            if isinstance(block, bytes):
                return b"HMSG %b %d %d\r\n%b%b\r\n" % (names, len(block), len(block) + len(data), block, data)
            return b"MSG %b %d\r\n%b\r\n" % (names, len(data), data)
        case ("info", bytes(info)):
            return b"INFO " + info + b"\r\n"
        case ("error", str(text)):
            return b"-ERR '" + text.encode() + b"'\r\n"
        case ("ok",):
            return b"+OK\r\n"
        case (str(word),):
            return word.upper().encode() + b"\r\n"
    raise AssertionError(operation)


# What nats-server lets through in a subject: anything but blank, tab, CR and LF; not even UTF-8 is asked for.
subjects = st.binary(min_size=1, max_size=40).map(
    lambda raw: raw.translate(bytes(120 if byte in b" \t\r\n" else byte for byte in range(256))).decode(
        "utf-8", "surrogateescape"
    )
)
payloads = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\r\n", b"MSG a 1 5\r\nxxxxx\r\n", b"\r\n" * 40]),
    st.integers(0, 3 * BUFFER_BYTES).map(lambda size: bytes(range(251)) * (size // 251) + bytes(size % 251)),
)
messages = st.tuples(
    st.just("message"),
    st.integers(1, 10**6).map(str),
    subjects,
    st.one_of(st.just(""), subjects),
    st.one_of(st.none(), st.binary(min_size=1, max_size=80)),
    payloads,
)
operations = st.one_of(
    messages,
    st.sampled_from([("ping",), ("pong",), ("ok",), ("info", b'{"a": 1}'), ("error", "Stale Connection")]),
)


def feed(receiver: Receiver, data: bytes, cuts: list[int]) -> None:
    """Give `data` as a transport does: into the receiver's own buffer, in pieces that end at `cuts`."""
    at = 0
    for cut in [*sorted(cuts), len(data)]:
        while at < cut:
            room = receiver.get_buffer(-1)
            assert len(room) > 0
            taken = min(len(room), cut - at)
            room[:taken] = data[at : at + taken]
            receiver.buffer_updated(taken)
            at += taken


@given(st.lists(operations, max_size=12), st.data())
def test_any_cutting_of_the_stream_gives_the_same_operations(sent: list[Operation], choice: st.DataObject) -> None:
    stream = b"".join(wire(operation) for operation in sent)
    cuts = choice.draw(st.lists(st.integers(0, len(stream)), max_size=30))
    sink = Recorder()
    feed(Receiver(sink), stream, cuts)
    assert sink.seen == [operation for operation in sent if operation != ("ok",)]


def test_byte_by_byte() -> None:
    sent: list[Operation] = [
        ("info", b"{}"),
        ("message", "7", "a.b", "r.1", b"NATS/1.0\r\nA: b\r\n\r\n", b"one"),
        ("message", "7", "a.b", "", None, b""),
        ("ping",),
        ("message", "8", "c", "", None, b"\r\n\r\n"),
        ("error", 'Permissions Violation for Publish to "x"'),
    ]
    stream = b"".join(wire(operation) for operation in sent)
    sink = Recorder()
    feed(Receiver(sink), stream, list(range(len(stream))))
    assert sink.seen == sent


@pytest.mark.parametrize("size, most", [(1 << 20, BUFFER_BYTES), (3 << 20, (6 << 20) + BUFFER_BYTES)])
def test_large_messages_back_to_back_are_moved_once_only(size: int, most: int) -> None:
    """The buffer holds none of a message's bulk, or about two of the very largest, however many come."""
    block = b"NATS/1.0\r\nA: b\r\n\r\n"
    sent = [("message", "1", "s", "", block if n % 2 else None, bytes([n]) * size) for n in range(8)]
    sink = Recorder()
    receiver = Receiver(sink)
    receiver.feed(b"".join(wire(message) for message in sent))
    assert sink.seen == sent
    assert len(receiver._buffer) <= most


@pytest.mark.parametrize("fill", [FIRST_BYTES - 1, FIRST_BYTES, FIRST_BYTES + 1])
def test_the_buffer_is_small_until_it_is_full(fill: int) -> None:
    """A connection that says little takes little; in one where more comes than that at once, nothing is lost."""
    ping, (whole, rest) = b"PING\r\n", divmod(fill, 6)
    sink = Recorder()
    receiver = Receiver(sink)
    for _ in range(100):
        feed(receiver, ping, [2])
    assert len(receiver._buffer) == FIRST_BYTES
    receiver.feed(ping * whole + ping[:rest])
    assert sink.seen == [("ping",)] * (100 + whole)
    assert len(receiver._buffer) == (FIRST_BYTES if fill < FIRST_BYTES else BUFFER_BYTES)
    receiver.feed(ping[rest:])
    assert sink.seen == [("ping",)] * (100 + whole + 1)


@pytest.mark.parametrize("size", [ASIDE.start - 1, ASIDE.start, BUFFER_BYTES + 1, ASIDE.stop - 1, ASIDE.stop])
@pytest.mark.parametrize("missing", range(5))
def test_a_large_message_may_be_cut_anywhere_at_its_end(size: int, missing: int) -> None:
    sent: list[Operation] = [("message", "1", "s", "r", b"NATS/1.0\r\n\r\n", bytes(size)), ("ping",)] * 2
    stream = b"".join(wire(operation) for operation in sent)
    end = stream.index(b"PING") - missing
    sink = Recorder()
    feed(Receiver(sink), stream, [20, end, end + 1, end + 2])
    assert sink.seen == sent


def test_a_connection_that_ends_within_a_large_message_has_not_brought_it() -> None:
    stream = wire(("message", "1", "s", "", None, bytes(1 << 20)))
    sink = Recorder()
    receiver = Receiver(sink)
    feed(receiver, stream[:-2], [100])
    receiver.eof_received()
    assert sink.seen == []


def test_feed_takes_more_than_the_buffer_holds() -> None:
    sink = Recorder()
    Receiver(sink).feed(b"PING\r\n" * BUFFER_BYTES)
    assert sink.seen == [("ping",)] * BUFFER_BYTES


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"MSG a 1 x\r\n",
        b"MSG a 1 -5\r\n",
        b"MSG a 1\r\n",
        b"MSG 5\r\n",
        b"MSG a b c d 5\r\n",
        b"HMSG a 1 9 5\r\nxxxxxxxxx\r\n",
        b"HMSG a 1 -1 5\r\nxxxxx\r\n",
        b"MSG a 1 99999999999\r\n",
        b"\r\n",
        b"x" * (MAX_LINE + 2),
    ],
)
def test_what_is_no_protocol_is_reported_once_and_nothing_follows(garbage: bytes) -> None:
    sink = Recorder()
    receiver = Receiver(sink)
    receiver.feed(b"PING\r\n" + garbage + b"MSG a 1 1\r\nx\r\n")
    receiver.feed(b"PING\r\n")
    assert sink.seen == [("ping",), ("broken",)]


names = st.text(st.sampled_from("abcXYZ019-_.~"), min_size=1, max_size=20)
values = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=40).map(lambda v: v.strip(" \t"))


@given(st.dictionaries(names, values, max_size=6))
def test_headers_come_back(headers: dict[str, str]) -> None:
    assert parse_headers(encode_headers(headers)) == headers
    assert Message("s", b"", "", encode_headers(headers)).headers == headers


@given(st.binary(max_size=200))
def test_no_header_block_can_raise(block: bytes) -> None:
    parse_headers(block)
    assert Message("s", b"x", "", b"NATS/1.0" + block).no_responders is False


@pytest.mark.parametrize(
    ("name", "value"),
    [("A\r\nB", "x"), ("A", "x\r\nB: y"), ("A", "x\n"), ("A", "\r"), ("", "x"), ("A b", "x"), ("A:", "x"), ("ä", "x")],
)
def test_headers_that_would_break_out_are_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidArgument):
        encode_headers({name: value})


def test_a_lone_surrogate_is_no_value() -> None:
    with pytest.raises(InvalidArgument):
        encode_headers({"A": "\ud800"})


def test_status_lines() -> None:
    assert parse_headers(b"NATS/1.0 503\r\n\r\n") == {"Status": "503"}
    assert parse_headers(b"NATS/1.0 404 No Messages\r\nA: b\r\n\r\n") == {
        "Status": "404",
        "Description": "No Messages",
        "A": "b",
    }
    assert Message("s", b"", "", b"NATS/1.0 503\r\n\r\n").no_responders
    assert not Message("s", b"", "", b"NATS/1.0 404\r\n\r\n").no_responders
    assert not Message("s", b"data", "", b"NATS/1.0 503\r\n\r\n").no_responders
    assert Message("s", b"").headers is None


def test_of_a_repeated_header_the_first_counts_and_malformed_lines_are_left_out() -> None:
    block = b"NATS/1.0\r\nA: 1\r\nA: 2\r\nno colon\r\nbad name: x\r\n: y\r\nB:\xff\r\n\r\n"
    assert parse_headers(block) == {"A": "1", "B": "\ufffd"}
