"""The monitor's clients: whole frames in, frames out, and none of them can block it or another."""

from __future__ import annotations

import os
import select

from wherry_task.monitor import libc, wire
from wherry_task.monitor.poller import Poller

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Args = dict[str, Any]

_CHUNK = 1 << 16


class Client:
    """One connection of the task service."""

    __slots__ = ("fd", "inbox", "outbox", "watching")

    def __init__(self, fd: int, inbox: bytearray) -> None:
        self.fd = fd
        self.inbox = inbox
        self.outbox = bytearray()
        self.watching = False


class Clients(Poller):
    """Accepts and serves connections; what a frame means is for `request`, who cares that one went for `left`."""

    __slots__ = ("clients",)

    def __init__(self) -> None:
        super().__init__()
        self.clients: dict[int, Client] = {}

    def request(self, client: Client, args: Args) -> None:
        """Act on a request. May raise Failure, which is sent as the reply."""
        raise NotImplementedError

    def left(self) -> None:
        """A client has gone."""
        raise NotImplementedError

    def accept(self, listener: int, _: int) -> None:
        """A listening socket is ready."""
        try:
            fd = libc.accept(listener)
        except OSError:
            return
        self.clients[fd] = Client(fd, bytearray())
        self.watch(fd, select.POLLIN, self.received)

    def received(self, fd: int, events: int) -> None:
        """A client's socket is ready."""
        client = self.clients[fd]
        if events & select.POLLOUT:
            self.flush(client)
        if client.fd < 0 or not events & ~select.POLLOUT:
            return
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(client)
            return
        client.inbox += data
        self.deliver(client)

    def deliver(self, client: Client) -> None:
        """Act on every whole frame that the client has sent."""
        try:
            while client.fd >= 0 and (args := wire.take(client.inbox)) is not None:
                try:
                    self.request(client, args)
                except wire.Failure as failure:
                    self.send(client, wire.refusal(args.get("id"), failure.body()))
        except ValueError:
            self.drop(client)

    def send(self, client: Client, frame: bytes) -> None:
        """Queue one frame; to a client that has gone this does nothing."""
        if client.fd >= 0:
            client.outbox += frame
            self.flush(client)
            if len(client.outbox) > wire.MAX_UNSENT:
                self.drop(client)

    def flush(self, client: Client) -> None:
        """Hand over what the socket takes now; the rest follows when it is writable."""
        try:
            while client.outbox:
                del client.outbox[: os.write(client.fd, client.outbox)]
        except BlockingIOError:
            self.watch(client.fd, select.POLLIN | select.POLLOUT, self.received)
            return
        except OSError:
            self.drop(client)
            return
        self.watch(client.fd, select.POLLIN, self.received)

    def drop(self, client: Client) -> None:
        """Hang up; a second call does nothing."""
        if client.fd < 0:
            return
        self.unwatch(client.fd)
        os.close(client.fd)
        del self.clients[client.fd]
        client.fd = -1
        self.left()
