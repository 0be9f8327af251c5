"""The bytes of a NATS connection: received messages, header blocks, and the parser that finds both.

nats-py feeds its parser from a task and compares every line with seven regular expressions. Here the event loop
reads into one buffer of ours, and a large body to where it stays; the parser walks over it once, and the sink is
called synchronously for each operation. Source of the format: the NATS client protocol (INFO, MSG, HMSG, PING, PONG,
+OK, -ERR) and the header block of NATS/1.0.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from io import BytesIO
from typing import Final
from typing import Protocol as Interface

from ..errors import InvalidArgument
from ..heap import blank

# The receive buffer: until a read has filled it, and from then on. It grows to hold what is not read aside.
FIRST_BYTES: Final = 4 << 10
BUFFER_BYTES: Final = 64 << 10
MAX_LINE: Final = 256 << 10  # an INFO of a large cluster is the longest control line there is
ASIDE: Final = range(48 << 10, 2 << 20)  # bodies of so many bytes are read to where they stay
MAX_BODY: Final = 65 << 20  # nats-server allows no max_payload above 64 MB, and adds headers of its own
HEADERS_MAX: Final = 128  # lines of one block that are read; a million of them would stop the event loop
STATUS: Final = "Status"
DESCRIPTION: Final = "Description"

_CRLF: Final = b"\r\n"
_NO_ROOM: Final = memoryview(b"")
_MAGIC: Final = b"NATS/1.0"
_NO_RESPONDERS: Final = b"NATS/1.0 503"
_M, _H, _P, _I, _PLUS, _MINUS = b"MHPI+-"
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 7230's token


class Message:
    """One received message. `reply` is "" when no answer is asked for; `data` is the payload without headers."""

    __slots__ = ("_block", "_headers", "data", "reply", "subject")

    def __init__(self, subject: str, data: bytes, reply: str = "", block: bytes | None = None) -> None:
        self.subject = subject
        self.data = data
        self.reply = reply
        self._block = block
        self._headers: Mapping[str, str] | None = None

    @property
    def headers(self) -> Mapping[str, str] | None:
        """Header name -> value, or None. A status line of the server appears as `Status` and `Description`."""
        if self._headers is None and self._block is not None:
            self._headers = parse_headers(self._block)
        return self._headers

    def header(self, name: bytes) -> str | None:
        """The value of one header, or None: quicker than to read all of them. name: as b"\\r\\nName: "."""
        block = self._block
        if block is None:
            return None
        at = block.find(name)
        if at < 0:
            return None
        at += len(name)
        return str(block[at : block.find(_CRLF, at)], "utf-8", "replace")

    @property
    def no_responders(self) -> bool:
        """Whether this is the server's word that nobody listened to the request."""
        return not self.data and self._block is not None and self._block.startswith(_NO_RESPONDERS)

    def __repr__(self) -> str:
        return f"<Message {self.subject!r} reply={self.reply!r} {len(self.data)} bytes>"


_names: set[str] = set()  # header names that were checked; few are ever used
_NAMES_MAX: Final = 512


def _is_name(name: str) -> bool:
    if not _NAME.fullmatch(name):
        return False
    if len(_names) < _NAMES_MAX:
        _names.add(name)
    return True


def encode_headers(headers: Mapping[str, str]) -> bytes:
    """The header block of `headers`, with its end. Raises InvalidArgument for a name or value that would break it."""
    text = "NATS/1.0\r\n"
    for name, value in headers.items():
        if name not in _names and not _is_name(name):
            raise InvalidArgument(f"header name {name!r} is not a token of letters, digits and !#$%&'*+-.^_`|~")
        if "\r" in value or "\n" in value:
            raise InvalidArgument(f"header {name!r} has a line break in its value")
        text += f"{name}: {value}\r\n"
    try:
        return (text + "\r\n").encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"a header of {list(headers)} has a value that is no Unicode text") from error


def parse_headers(block: bytes) -> dict[str, str]:
    """Name -> value of a received block, without surrounding blanks. Never raises: what is malformed is left out.

    So is what follows the first 128 lines. Of a name that is given twice the first value counts, which is the one
    nats-server itself reads.
    """
    lines = str(block, "utf-8", "replace").split("\r\n", HEADERS_MAX + 1)
    found: dict[str, str] = {}
    first = lines[0]
    if len(first) > len(_MAGIC):
        status, _, description = first[len(_MAGIC) :].strip(" ").partition(" ")
        if status.isdecimal():
            found[STATUS] = status
            if description:
                found[DESCRIPTION] = description
    for line in lines[1 : HEADERS_MAX + 1]:
        name, colon, value = line.partition(":")
        if colon and name not in found and (name in _names or _is_name(name)):
            found[name] = value.strip(" \t")
    return found


class Sink(Interface):
    """What the parser calls. No method may raise: an exception would be the transport's."""

    def on_message(self, sid: str, subject: str, reply: str, block: bytes | None, data: bytes) -> None:
        """One message; `block` is its raw header block or None."""

    def on_ping(self) -> None:
        """The server wants a PONG."""

    def on_pong(self) -> None:
        """The server answered our oldest PING."""

    def on_info(self, info: bytes) -> None:
        """JSON of a changed server or cluster."""

    def on_error(self, text: str) -> None:
        """The words of an -ERR line, without its quotes."""

    def on_broken(self, reason: str) -> None:
        """The stream is no NATS protocol any more; nothing further is delivered."""

    def on_lost(self, error: Exception | None) -> None:
        """The connection is gone."""

    def on_pressure(self, paused: bool) -> None:
        """The transport's write buffer went above its high-water mark, or came back below the low one."""


class Receiver(asyncio.BufferedProtocol):
    """Parses what the transport reads and calls the sink.

    `original` is the protocol that opened the transport: it hears of the connection's end and of back-pressure,
    so that the StreamWriter built on it keeps working. limit: bytes that one message may have, headers included.
    """

    def __init__(self, sink: Sink, original: asyncio.Protocol | None = None, *, limit: int = MAX_BODY) -> None:
        self._sink = sink
        self._original = original
        self._limit = limit
        self._buffer = bytearray(FIRST_BYTES)
        self._view = memoryview(self._buffer)
        self._end = 0  # bytes of the buffer that are filled; an unfinished operation always starts at 0
        self._need = -1  # size of the body that is awaited, header block included; -1 between messages
        self._block = 0  # size of the header block in that body
        self._head: bytes | None = None  # that block, where the body is read aside
        self._line: tuple[str, str, str] = ("", "", "")  # subject, sid, reply of the message in hand
        self._aside: BytesIO | None = (
            None  # the payload of the message in hand, where it does not go through the buffer
        )
        self._room = _NO_ROOM  # what is still to come of it
        self._broken = False

    def feed(self, data: bytes) -> None:
        """Parse bytes that somebody else has read."""
        at = 0
        while at < len(data):
            room = self.get_buffer(-1)
            part = data[at : at + len(room)]
            room[: len(part)] = part
            self.buffer_updated(len(part))
            at += len(part)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room or self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._broken:
            return
        if self._room:
            self._room = self._room[nbytes:] or _NO_ROOM
            return
        self._end += nbytes
        try:
            self._keep(self._parse())
        except ValueError as error:
            self._broken, self._end = True, 0
            self._sink.on_broken(str(error))

    def _parse(self) -> int:
        """Deliver every complete operation; the position where the first incomplete one starts."""
        buffer, view, sink, end, need, pos = self._buffer, self._view, self._sink, self._end, self._need, 0
        while True:
            if need >= 0:
                stop = pos + need
                if stop + 2 > end:
                    if need in ASIDE and pos + self._block <= end < stop:
                        need, pos = self._read_aside(pos, stop), end
                    break
                subject, sid, reply = self._line
                if self._aside is not None:
                    data, self._aside = self._aside.getvalue(), None
                    sink.on_message(sid, subject, reply, self._head, data)
                elif self._block:
                    body = pos + self._block
                    sink.on_message(sid, subject, reply, bytes(view[pos:body]), bytes(view[body:stop]))
                else:
                    sink.on_message(sid, subject, reply, None, bytes(view[pos:stop]))
                pos, need = stop + 2, -1
            eol = buffer.find(_CRLF, pos, end)
            if eol < 0:
                break
            first = buffer[pos]
            if first == _M:
                need = self._announce(buffer[pos + 4 : eol].decode("utf-8", "surrogateescape").split(" "), False)
            elif first == _H:
                need = self._announce(buffer[pos + 5 : eol].decode("utf-8", "surrogateescape").split(" "), True)
            else:
                self._control(first, bytes(view[pos:eol]))
            pos = eol + 2
        self._need = need
        return pos

    def _read_aside(self, pos: int, stop: int) -> int:
        """Have what the buffer does not hold yet of the payload, which ends at `stop`, read to where it stays.

        Answers what is left for the buffer of the message in hand, besides its line break. When that is there, nobody
        who reads holds the payload's buffer any more.
        """
        body = pos + self._block
        self._head = bytes(self._view[pos:body]) if self._block else None
        self._aside = blank(stop - body)
        room, got = self._aside.getbuffer(), self._end - body
        room[:got] = self._view[body : self._end]
        self._room = room[got:]
        return 0

    def _announce(self, fields: list[str], with_block: bool) -> int:
        """Note `subject sid [reply] [block size] size` and return the size. Raises ValueError if it is not that."""
        if len(fields) < 3:
            raise ValueError(f"a message is announced by {fields!r}"[:80])
        size = int(fields.pop())
        block = int(fields.pop()) if with_block else 0
        if len(fields) == 2:
            fields.append("")
        subject, sid, reply = fields
        if not 0 <= block <= size <= self._limit:
            raise ValueError(f"a message on {subject!r} announces {size} bytes, {block} of them headers")
        self._line, self._block = (subject, sid, reply), block
        return size

    def _control(self, first: int, line: bytes) -> None:
        if first == _P and line[:4] == b"PING":
            self._sink.on_ping()
        elif first == _P and line[:4] == b"PONG":
            self._sink.on_pong()
        elif first == _I and line[:5] == b"INFO ":
            self._sink.on_info(line[5:])
        elif first == _MINUS and line[:4] == b"-ERR":
            self._sink.on_error(line[4:].decode("utf-8", "replace").strip().strip("'"))
        elif first != _PLUS:
            raise ValueError(f"not an operation of the NATS protocol: {line[:40]!r}")

    def _keep(self, start: int) -> None:
        """Move the unfinished operation to the front, and make room for all of it: each is moved once only."""
        left = self._end - start
        if self._need < 0 and left > MAX_LINE:
            raise ValueError(f"a control line exceeds {MAX_LINE} bytes")
        wanted = self._need + 2 if self._need >= 0 else left + 1
        room = len(self._buffer)
        if wanted > room or self._end == room == FIRST_BYTES:
            grown = bytearray(BUFFER_BYTES if wanted <= BUFFER_BYTES else max(wanted + BUFFER_BYTES, 2 * room))
            grown[:left] = self._view[start : self._end]
            self._buffer, self._view = grown, memoryview(grown)
        elif start and left:
            self._view[:left] = self._view[start : self._end]
        self._end = left

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._original is not None:
            self._original.connection_lost(exc)
        self._sink.on_lost(exc)

    def pause_writing(self) -> None:
        if self._original is not None:
            self._original.pause_writing()
        self._sink.on_pressure(True)

    def resume_writing(self) -> None:
        if self._original is not None:
            self._original.resume_writing()
        self._sink.on_pressure(False)
