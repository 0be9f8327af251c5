"""The process's one connection to the bus: publish, subscribe, ask.

Nothing is ever buffered for an outage: what cannot be sent now is refused now, and what was asked and is not
answered when the connection drops fails then. So a caller that was told «unavailable» is never served behind its back.
Against a server that merely stalls and goes on, a request carries its deadline, and services drop what is late.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from nats.errors import BadSubjectError
from nats.errors import Error as NatsError
from nats.js import JetStreamContext

from ..errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    WherryError,
)
from .dial import dial, discard
from .link import Link, check_version, sendable
from .protocol import Message, encode_headers
from .stream import JetStreamLog
from .transport import Answer, Callback, NoResponders
from .waiting import Waiting

__all__ = ["Callback", "Connection", "Message", "NoResponders", "Subscription", "check_version"]

log = logging.getLogger(__name__)

_CRLF: Final = b"\r\n"
_VIOLATION = re.compile(
    r'permissions violation for (publish with reply of|publish to|subscription to) "((?:[^"\\]|\\.)*)"'
    r'(?: using queue "((?:[^"\\]|\\.)*)")?',
    re.IGNORECASE,
)


class Subscription:
    """An interest in a subject; it survives reconnections until it is ended."""

    __slots__ = ("_connection", "_sid", "queue", "subject")

    def __init__(self, connection: Connection, sid: int, subject: str, queue: str) -> None:
        self._connection = connection
        self._sid = sid
        self.subject = subject
        self.queue = queue

    async def unsubscribe(self) -> None:
        """End it now: the callback is not called any more. Never raises, and may be repeated."""
        await self._connection._unsubscribe(self._sid)
        self._connection._forget(self._sid)

    async def drain(self, timeout: float = 5.0) -> None:
        """Stop receiving; what the server has already sent is delivered before this returns.

        A connection that drops meanwhile has nothing more to deliver, which ends it too. DeadlineExceeded when the
        server does not answer within `timeout` seconds.
        """
        try:
            await self._connection._unsubscribe(self._sid)
            await self._connection.flush(timeout)
        except Unavailable:
            log.debug("the connection dropped while %s was drained", self.subject)
        finally:
            self._connection._forget(self._sid)


class _Interest:
    """A subscription whose SUB the server has not yet let pass."""

    __slots__ = ("error", "queue", "subject")

    def __init__(self, subject: str, queue: str) -> None:
        self.subject, self.queue = subject, queue
        self.error: WherryError | None = None


class Connection:
    """One authenticated connection to NATS, shared by everything in the process. Make it with `connect`.

    on_state: called with False when the connection drops or is closed, and with True when it is back and subscribed
    again.
    """

    def __init__(self, link: Link, inbox_prefix: str) -> None:
        """Used by `connect`."""
        self.on_state: list[Callable[[bool], None]] = []
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._inbox_prefix = inbox_prefix
        self._inbox = f"{inbox_prefix}.{link._nuid.next().decode()}"
        self._waiting = Waiting(self._inbox)
        self._flushes: set[asyncio.Future[Any]] = set()
        self._interests: list[_Interest] = []
        self._announced = True
        self._closing = False
        link.state_changed = self._state_changed
        link.refused = self._refused

    @classmethod
    async def connect(
        cls,
        servers: Sequence[str],
        *,
        name: str,
        inbox_prefix: str,
        seed: bytes | None = None,
        user_credentials: str | None = None,
        tls: ssl.SSLContext | None = None,
        connect_timeout: float = 5.0,
    ) -> Connection:
        """Connect to any of `servers` (`nats://host:port`), trying until one answers or `connect_timeout` seconds pass.

        seed: an nkey user seed; user_credentials: path of a JWT credentials file. inbox_prefix: where answers come in.
        Later outages are repaired for ever, with 50 ms to 1 s between attempts.
        Raises Unavailable when none answers in time, Unauthenticated when one refuses the credentials,
        FailedPrecondition when one is too old, does not ask for the nkey, or offers no TLS though `tls` is given,
        InvalidArgument for a bad address, seed or prefix.
        """
        link = await dial(
            servers,
            name=name,
            inbox_prefix=inbox_prefix,
            seed=seed,
            user_credentials=user_credentials,
            tls=tls,
            timeout=connect_timeout,
        )
        try:
            connection = cls(link, inbox_prefix)
            await connection.subscribe(f"{connection._inbox}.*", connection._answered)
        except BaseException:
            await discard(link)
            raise
        return connection

    # ---- what it is

    @property
    def connected(self) -> bool:
        return self._link.out is not None

    @property
    def server_version(self) -> str:
        return str(self._link._server_info.get("version", ""))

    @property
    def max_payload(self) -> int:
        """Bytes that one message may have, its headers included."""
        return self._link._max_payload

    @property
    def client_url(self) -> str:
        """`nats://host:port` of the server in use, without credentials; "" during an outage."""
        url = self._link.connected_url if self.connected else None
        return f"{url.scheme}://{url.hostname}:{url.port}" if url else ""

    @property
    def inbox_prefix(self) -> str:
        return self._inbox_prefix

    def event_log(self, name: str, subject: str) -> JetStreamLog:
        """The durable stream `name` over `subject`; for its owner, the events service."""
        return JetStreamLog(self, name, subject)

    def jetstream(self, **options: Any) -> JetStreamContext:
        """JetStream over this connection; its calls raise nats-py's own errors."""
        return self._link.jetstream(**options)

    # ---- publish

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Send, and forget; it leaves at the end of this iteration of the event loop.

        Raises Unavailable when not connected, InvalidArgument for a malformed subject or header or more than
        `max_payload` bytes, ResourceExhausted when 64 MiB wait to be sent: await `writable()` between bulk sends.
        """
        link = self._link
        if link.out is None:
            raise self._away()
        if not sendable(subject) or (reply and not sendable(reply)):
            raise InvalidArgument(f"{subject!r} with reply {reply!r} is no subject to publish on")
        link.check_room()
        size = len(data)
        names = f"{subject} {reply}" if reply else subject
        if headers:
            block = encode_headers(headers)
            size += len(block)
            head = f"HPUB {names} {len(block)} {size}\r\n".encode() + block
        else:
            head = f"PUB {names} {size}\r\n".encode()
        if size > link._max_payload:
            raise InvalidArgument(f"{size} bytes for {subject} exceed the server's limit of {link._max_payload}")
        link.write(head, data, _CRLF, size=len(head) + len(data) + 2)

    async def writable(self) -> None:
        """Wait while over 4 MiB are still to be sent. Raises Unavailable when the connection drops."""
        await self._link.room.wait()
        if self._link.out is None:
            raise self._away()

    # ---- request

    async def request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, timeout: float
    ) -> Message:
        """Ask, and wait up to `timeout` seconds for the first answer. A later one is dropped.

        Raises NoResponders at once when nobody listens, Unavailable when the connection is or gets lost,
        PermissionDenied when the server refuses the subject, DeadlineExceeded at the timeout; and what `publish`
        raises.
        """
        reply, answer = self._waiting.ask(subject, timeout)
        try:
            self.publish(subject, data, reply=reply, headers=headers)
            return await answer
        finally:
            self._waiting.forget(reply)

    def ask(
        self, subject: str, data: bytes, answer: Answer, *, headers: Mapping[str, str] | None = None, timeout: float
    ) -> None:
        """The same, without waiting: the answer or the error is told to `answer`. Raises what `publish` raises."""
        reply = self._waiting.expect(answer, subject, timeout)
        try:
            self.publish(subject, data, reply=reply, headers=headers)
        except BaseException:
            self._waiting.forget(reply)
            raise

    def _answered(self, message: Any) -> None:
        asked = self._waiting.take(message.subject)
        if asked is None:
            return
        answer, subject, _ = asked
        if message.no_responders:
            answer.set_exception(NoResponders(f"nobody listens on {subject}"))
        else:
            answer.set_result(message)

    # ---- subscribe

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Call `callback` with each message on `subject`, or, with `queue`, with this member's share of them.

        When this returns, the server has the subscription; it comes back by itself after an outage. The callback is
        called from the parser: it must not block, and what it raises is logged.
        Raises PermissionDenied when the server refuses, Unavailable when not connected, InvalidArgument for a
        malformed subject, ResourceExhausted when no subscription is left, DeadlineExceeded when the server is silent.
        """
        if not self.connected:
            raise self._away(f"cannot subscribe to {subject}: ")
        try:
            made = await self._link.subscribe(subject, queue=queue)
        except BadSubjectError as error:
            raise InvalidArgument(f"{subject!r} with queue {queue!r} is no subject to subscribe to") from error
        except NatsError as error:
            raise Unavailable(f"cannot subscribe to {subject}: {error}") from error
        self._link.callbacks[str(made._id)] = callback
        interest = _Interest(subject, queue)
        self._interests.append(interest)
        try:
            await self.flush()
            if interest.error is not None:
                raise interest.error
        except BaseException:
            await self._unsubscribe(made._id)
            self._forget(made._id)
            raise
        finally:
            self._interests.remove(interest)
        return Subscription(self, made._id, subject, queue)

    async def _unsubscribe(self, sid: int) -> None:
        """Tell the server, and do not replay it; the callback stays for what is on its way."""
        if self._link._subs.pop(sid, None) is not None:
            await self._link._send_unsubscribe(sid)

    def _forget(self, sid: int) -> None:
        self._link.callbacks.pop(str(sid), None)

    # ---- flush and the end

    async def flush(self, timeout: float = 5.0) -> None:
        """Return when the server has taken all that was published: one round trip.

        Raises Unavailable when the connection is or gets lost, DeadlineExceeded after `timeout` seconds.
        """
        if not self.connected:
            raise self._away()
        pong: asyncio.Future[Any] = self._loop.create_future()
        self._flushes.add(pong)
        try:
            async with asyncio.timeout(timeout):
                await self._link._send_ping(pong)
                await pong
        except TimeoutError as error:
            raise DeadlineExceeded(f"nats-server did not answer a ping within {timeout:g} s") from error
        finally:
            self._flushes.discard(pong)

    async def drain(self, timeout: float = 10.0) -> None:
        """End every subscription of `subscribe`, let requests under way be answered, and close.

        What the server has already sent is delivered. After `timeout` seconds it closes in any case. JetStream's
        subscriptions are just closed: what they did not acknowledge is delivered again to the next.
        """
        try:
            async with asyncio.timeout(timeout):
                inbox = f"{self._inbox}.*"
                subs = list(self._link._subs.items())
                for sid, sub in subs:
                    if str(sid) in self._link.callbacks and sub.subject != inbox:
                        await self._unsubscribe(sid)
                await self.flush(timeout)
                await self._waiting.over()
                await self.flush(timeout)
        except (TimeoutError, Unavailable, DeadlineExceeded) as error:
            log.warning("closing a connection that could not be drained: %s", error or "timeout")
        await self.close()

    async def close(self) -> None:
        """Send what was published, disconnect, and fail what still waits with Unavailable. It may be repeated.

        What is asked of it from then on is FailedPrecondition: it comes back no more, so nobody waits for it.
        """
        if self._closing:
            return
        self._closing = True
        self._link.callbacks.clear()
        await discard(self._link)
        self._tell(connected=False)

    def _away(self, what: str = "") -> WherryError:
        """Why nothing can be sent."""
        if self._closing:
            return FailedPrecondition(f"{what}the connection is closed")
        return Unavailable(f"{what}the process is not connected to NATS")

    # ---- the link's reports

    def _state_changed(self, connected: bool) -> None:
        if not connected:
            self._fail_waiting()
        if connected == self._announced or self._closing:
            return
        self._announced = connected
        log.log(logging.INFO if connected else logging.WARNING, "NATS is %s", "back" if connected else "lost")
        self._tell(connected=connected)

    def _tell(self, *, connected: bool) -> None:
        for listener in list(self.on_state):
            try:
                listener(connected)
            except Exception:
                log.exception("a listener to the connection's state failed")

    def _fail_waiting(self) -> None:
        self._waiting.fail(lambda subject: Unavailable(f"the connection to NATS dropped before {subject} was answered"))
        for pong in self._flushes:
            if not pong.done():
                pong.set_exception(Unavailable("the connection to NATS dropped"))

    def _refused(self, text: str) -> None:
        """An -ERR of the server: find out whom it concerns."""
        match = _VIOLATION.search(text)
        if match is None:
            self._refused_otherwise(text)
            return
        kind = match[1].lower()
        subject, queue = (re.sub(r"\\(.)", r"\1", part or "") for part in match.group(2, 3))
        denied = PermissionDenied(f"this identity may not {_RIGHTS[kind]} {subject}")
        if kind.startswith("subscription"):
            for interest in self._interests:
                if (interest.subject, interest.queue) == (subject, queue) and interest.error is None:
                    interest.error = denied
                    return
        elif self._deny(kind, subject, denied):
            return
        log.warning("nats-server: %s", text)

    def _refused_otherwise(self, text: str) -> None:
        log.warning("nats-server: %s", text)
        if "maximum subscriptions exceeded" in text.lower():
            for interest in self._interests:
                interest.error = interest.error or ResourceExhausted(f"cannot subscribe to {interest.subject}: {text}")

    def _deny(self, kind: str, subject: str, denied: PermissionDenied) -> bool:
        """Fail the requests that a refused subject, or a refused inbox, belongs to."""
        of_reply = kind.endswith("reply of")
        found = [
            reply
            for reply, (answer, asked, _) in self._waiting
            if (reply if of_reply else asked) == subject and not answer.done()
        ]
        for reply in found:
            self._waiting.refuse(reply, denied)
        return bool(found)


_RIGHTS: Final = {
    "publish to": "publish on",
    "publish with reply of": "ask for replies on",
    "subscription to": "subscribe to",
}
