"""ttrpc: gRPC's unary calls without HTTP, as shims speak it.

A frame is 10 bytes of header - length (at most 4 MiB), stream id, type 1 request or 2 response, flags - and a protobuf
Request{service 1, method 2, payload 3, timeout_nano 4, metadata 5} or Response{status 1, payload 2}.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from wherry_shared.errors import Unavailable, Unimplemented, Unknown, WherryError, from_code

from .protobuf import decode, encode, integer, octets, text

log = logging.getLogger("wherry.task.ttrpc")

_HEADER = struct.Struct(">IIBB")
_REQUEST, _RESPONSE = 1, 2
_MAX = 4 << 20
Handler = Callable[[str, str, bytes], Awaitable[bytes]]


class Client:
    """One connection to a server. `on_end` is called once when the other side hangs up."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, namespace: str) -> None:
        self._reader = reader
        self._writer = writer
        self._metadata = [{1: "containerd-namespace-ttrpc", 2: namespace}]
        self._streams = itertools.count(1, 2)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._closing = False
        self.on_end: Callable[[], None] | None = None
        self._task = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def connect(cls, path: str, namespace: str) -> Client:
        """To a unix socket. Raises OSError."""
        reader, writer = await asyncio.open_unix_connection(path)
        return cls(reader, writer, namespace)

    @property
    def alive(self) -> bool:
        return not self._task.done()

    async def call(self, service: str, method: str, request: Mapping[int, Any], *, patience: float | None) -> bytes:
        """The payload of the answer. Raises what the server refused with; Unavailable when it is gone or silent."""
        if not self.alive:
            raise Unavailable(f"the shim is gone ({method})")
        number = next(self._streams)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        body = encode({
            1: service, 2: method, 3: encode(request), 4: int((patience or 0) * 1e9), 5: self._metadata
        })  # fmt: skip
        self._writer.write(_HEADER.pack(len(body), number, _REQUEST, 0) + body)
        try:
            async with asyncio.timeout(patience):
                return await answer
        except TimeoutError:
            raise Unavailable(f"the shim has not answered in {patience:.0f} s ({method})") from None
        finally:
            self._waiting.pop(number, None)

    async def _read(self) -> None:
        try:
            while True:
                number, _, body = await _frame(self._reader)
                answer = self._waiting.get(number)
                if answer is not None and not answer.done():
                    _settle(answer, body)
        except (asyncio.IncompleteReadError, OSError, WherryError) as e:
            if isinstance(e, WherryError):
                log.error("a shim sent what is no ttrpc: %s", e)
        finally:
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(Unavailable("the shim is gone"))
            self._writer.close()
            if not self._closing and self.on_end is not None:
                self.on_end()

    async def ended(self, patience: float) -> bool:
        """Whether the other side has hung up within `patience` seconds."""
        done, _ = await asyncio.wait({self._task}, timeout=patience)
        return bool(done)

    async def close(self) -> None:
        """Hang up."""
        self._closing = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


def _settle(answer: asyncio.Future[bytes], body: bytes) -> None:
    try:
        response = decode(body)
        status = decode(octets(response, 1))
        code = integer(status, 1)
        if code:
            answer.set_exception(from_code(code, text(status, 2) or "the shim does not say why"))
        else:
            answer.set_result(octets(response, 2))
    except WherryError as e:
        answer.set_exception(e)


async def _frame(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    size, number, kind, _ = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    if size > _MAX:
        raise Unknown(f"a ttrpc message of {size} bytes")
    return number, kind, await reader.readexactly(size)


class Server:
    """Answers unary calls on a unix socket through one handler (service, method, payload) -> payload."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, path: str) -> None:
        """Listen. Raises OSError."""
        self._server = await asyncio.start_unix_server(self._serve, path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._connections.add(task)
        try:
            while True:
                number, kind, body = await _frame(reader)
                if kind == _REQUEST:
                    answer = await self._answer(body)
                    writer.write(_HEADER.pack(len(answer), number, _RESPONSE, 0) + answer)
        except (asyncio.IncompleteReadError, OSError, WherryError, asyncio.CancelledError):
            pass
        finally:
            if task is not None:
                self._connections.discard(task)
            writer.close()

    async def _answer(self, body: bytes) -> bytes:
        try:
            request = decode(body)
            payload = await self._handler(text(request, 1), text(request, 2), octets(request, 3))
            return encode({2: payload})
        except WherryError as e:
            return encode({1: {1: e.code, 2: e.message}})

    async def close(self) -> None:
        """Listen no longer, and hang up."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()


async def refuse(service: str, method: str, payload: bytes) -> bytes:
    """The handler of a server that serves nothing."""
    raise Unimplemented(f"{service}/{method}")
