"""A connection that speaks the monitor's protocol (monitor/README.md): requests by number, and notices in between."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wherry_shared.errors import Internal, Unavailable, from_code

FRAME_MAX = 1 << 20
# A monitor does everything in a moment, but for the runtime's own work and output that is still being read.
PATIENCE = 10.0
LONG_PATIENCE = 50.0
# One fork of the zygote's takes less.
QUEUE_SECONDS = 0.005


async def _connected(path: str) -> socket.socket:
    """A connection, also where so many wait to be accepted that the next is refused for now: a loop would say that
    nobody listens, or that it is connected. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    ends = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                if time.monotonic() > ends:
                    raise
            await asyncio.sleep(QUEUE_SECONDS)
    except BaseException:
        sock.close()
        raise


class Channel:
    """Notices that come before anyone wants them are kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._closing = False
        self._notices: list[dict[str, Any]] = []
        self._on_notice: Callable[[dict[str, Any]], None] = self._notices.append
        self._on_gone: Callable[[], None] | None = None
        self._task = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def open(cls, directory: Path, name: str) -> Channel:
        """Connect to a socket by its directory (a long path would not fit into an address). Raises OSError."""
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock = await _connected(f"/proc/self/fd/{fd}/{name}")
        finally:
            os.close(fd)
        return cls(*await asyncio.open_unix_connection(sock=sock))

    @property
    def alive(self) -> bool:
        """Whether the other end has not hung up yet."""
        return not self._task.done()

    async def ask(self, op: str, *, patience: float = PATIENCE, **arguments: Any) -> dict[str, Any]:
        """One operation. Unavailable when the other end is gone or silent; else what it refused with."""
        if self._task.done():
            raise Unavailable(f"the monitor is gone ({op})")
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self.tell(op, number, **arguments)
        try:
            async with asyncio.timeout(patience):
                return await answer
        except TimeoutError:
            raise Unavailable(f"the monitor has not answered in {patience:.0f} s ({op})") from None
        finally:
            self._waiting.pop(number, None)

    def tell(self, op: str, number: int = 0, **arguments: Any) -> None:
        """One operation whose answer nobody waits for."""
        body = json.dumps({"id": number, "op": op, **arguments}, separators=(",", ":")).encode()
        self._writer.write(len(body).to_bytes(4, "big") + body)

    def follow(self, on_notice: Callable[[dict[str, Any]], None], on_gone: Callable[[], None]) -> None:
        """Hand over notices, the kept ones first, and the end of the connection, also one that was before."""
        kept, self._notices = self._notices, []
        self._on_notice, self._on_gone = on_notice, on_gone
        for message in kept:
            on_notice(message)
        if self._task.done() and not self._closing:
            on_gone()

    def forget_end(self) -> None:
        """That the other end hangs up is nobody's concern from now on."""
        self._on_gone = None

    async def _read(self) -> None:
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(4), "big")
                if size > FRAME_MAX:
                    raise Internal(f"a monitor sent a frame of {size} bytes")
                self._take(json.loads(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(Unavailable("the monitor is gone"))
            self._writer.close()
            if not self._closing and self._on_gone is not None:
                self._on_gone()

    def _take(self, message: dict[str, Any]) -> None:
        if "notice" in message:
            self._on_notice(message)
            return
        answer = self._waiting.get(message.get("id", 0))
        if answer is None or answer.done():
            return
        error = message.get("error")
        if error is not None:
            answer.set_exception(from_code(int(error["code"]), str(error["message"])))
        else:
            answer.set_result(message.get("ok") or {})

    async def ended(self, patience: float) -> None:
        """Return when the other end has hung up, or after `patience` seconds."""
        await asyncio.wait({self._task}, timeout=patience)

    async def close(self) -> None:
        """Hang up without telling anyone."""
        self._closing = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
