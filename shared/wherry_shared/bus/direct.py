"""The direct path, the service's side: a unix socket of its own in the node's state directory.

A caller on the same host sends there what it would send to nats-server, and is answered on the same connection: the
same request with two hops less (docs/decisions/0013). Who asks is known from the reply subject as ever. What
nats-server's allow-lists would say of it is checked here: only the admin and the node's own services are served, and
everybody else is sent to the bus.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..context import Identity
from ..errors import ResourceExhausted, Unavailable
from . import sockets
from .credentials import ADMIN, CALLS
from .pipe import LEAVING, MAX_PAYLOAD, Pipe
from .protocol import Message, encode_headers
from .serve import IdentityOf, Server

log = logging.getLogger("wherry.direct")

GUESTS_MAX: Final = 256
LAST_SECONDS: Final = 1.0  # for the last answers to leave
_BACKLOG: Final = 128
_NO_FILES_SECONDS: Final = 1.0
_TO_THE_BUS: Final = b"NATS/1.0 503\r\n\r\n"
_PEER: Final = struct.Struct("3i")


def may_call(identity: Identity, service: str) -> bool:
    """Whether this path is for `identity` where it asks for `service`: what the bus allows it (credentials.CALLS)."""
    if identity.role == "service":
        return service in CALLS.get(identity.name, ())
    return identity.role == ADMIN


class Guest(Pipe):
    """One caller's connection."""

    def __init__(self, sock: socket.socket, door: Door) -> None:
        self._door = door
        self.known: Identity | None = None  # who was let in
        super().__init__(sock)

    @property
    def max_payload(self) -> int:
        return MAX_PAYLOAD

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Answer. Unavailable when the caller is gone, or has not read for too long and is dropped now."""
        try:
            self.send(subject, reply, encode_headers(headers) if headers else b"", data)
        except ResourceExhausted as error:
            self.end(error)
            raise

    def on_message(self, sid: str, subject: str, reply: str, block: bytes | None, data: bytes) -> None:
        if not self.ended:
            self._door.request(self, Message(subject, data, reply, block))

    def on_pressure(self, paused: bool) -> None:
        if paused:
            self.pause()
        else:
            self.resume()

    def on_lost(self, error: Exception | None) -> None:
        self._door.gone(self)
        if error is not None:
            log.debug("a direct caller is gone: %s", error)


class Door:
    """Listens for one served contract of one process. Implements serve.Entrance."""

    def __init__(self, server: Server, state: Path, identity_of: IdentityOf) -> None:
        """state: the node's state directory."""
        self._server = server
        self._service = server.service
        folder = sockets.folder(state, server.owner, server.node, server.service)
        self._path = folder / f"{server.token}{sockets.SUFFIX}"
        self._identity_of = identity_of
        self._guests: set[Guest] = set()
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None

    def open(self) -> None:
        """Listen from here on. OSError where there can be no socket."""
        sockets.make_folder(self._path.parent)
        sockets.sweep(self._path.parent)
        listener = sockets.listen(self._path, _BACKLOG)
        self._listener = listener
        self._loop.add_reader(listener, self._accept)

    def shut(self) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._loop.remove_reader(listener)
        with suppress(OSError):
            self._path.unlink()
        listener.close()

    async def leave(self) -> None:
        self.shut()
        for guest in self._guests:
            guest.say(LEAVING)
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS):
                await asyncio.gather(*(guest.sent() for guest in self._guests))
        for guest in list(self._guests):
            guest.end()

    # ---- who comes in

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # out of files, say: what can be seen from here cannot be made better from here
                log.error("no caller can be let in: %s", error)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(_NO_FILES_SECONDS, self._listen_again)
                return
            sock.setblocking(False)
            if len(self._guests) >= GUESTS_MAX or not _is_ours(sock):
                sock.close()
            else:
                self._guests.add(Guest(sock, self))

    def _listen_again(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    def gone(self, guest: Guest) -> None:
        """A connection has ended."""
        self._guests.discard(guest)

    def request(self, guest: Guest, message: Message) -> None:
        """One message of a caller: checked as the bus would, and served."""
        identity = self._identity_of(message.reply)
        if identity is None:
            log.warning("direct request on %s with a reply outside every known inbox: ended", message.subject)
            guest.end()
        elif identity is not guest.known and not may_call(identity, self._service):
            log.warning("%s has to ask %s by the bus", identity.name, self._service)
            self._send_away(guest, message)
        elif self._server.serves(message.subject):
            guest.known = identity
            self._server.take(message, identity, guest)
        else:
            self._send_away(guest, message)

    @staticmethod
    def _send_away(guest: Guest, message: Message) -> None:
        with suppress(Unavailable):
            guest.send(message.reply, "", _TO_THE_BUS, b"", alone=True)
        guest.end()


def open_door(server: Server, state: Path, identity_of: IdentityOf) -> None:
    """Let callers of this host in to what is served; where that cannot be, the bus remains."""
    door = Door(server, state, identity_of)
    try:
        door.open()
    except OSError as error:
        log.info("%s is served on the bus alone: %s", server.service, error)
    else:
        server.entrance = door


def _is_ours(sock: socket.socket) -> bool:
    """Whether the other end is root or this process's own user; the folder's mode says so too."""
    _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return uid in (0, os.geteuid())
