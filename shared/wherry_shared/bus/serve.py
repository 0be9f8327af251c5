"""The service's half of a call: a task per request behind a bound, its context, its answer or its error.

Who asks is known from the reply subject: each user's inbox prefix is a secret between it and the services, and the
bus lets nobody else subscribe to it. A request whose reply is in no known inbox is dropped. It is answered the way it
came: by the bus, or on the direct connection that brought it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .. import context
from ..context import Context, Identity, Replayed
from ..contract import IMMEDIATE, Contract, Endpoint
from ..errors import (
    Aborted,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    WherryError,
)  # fmt: skip
from . import subjects
from .answers import Answer, Answers, Back
from .audit import Audit
from .card import Card, Stats
from .proxy import DEADLINE, ERROR, ERROR_CODE, KEY, LEASE, RETRY, TRACE
from .transport import Message, Publisher, Subscription, Transport
from .turns import Backlog, Shares

log = logging.getLogger("wherry.serve")

RUNNING_MAX = 256
WAITS_MAX = 8192
BACKLOG_MAX = 8192
BACKLOG_BYTES = 64 << 20
KEY_MAX = 128
# A deadline further away is brought here: nobody waits that long, and timers are finite.
DEADLINE_MAX = 24 * 3600.0
ERROR_LINE_MAX, ERROR_MAX = 2048, 64 << 10
_ROUTES_MAX = 4096
# An answer of these says that the same call may succeed when it is made again: it is not kept under the key.
_TRANSIENT = (Unavailable, DeadlineExceeded, ResourceExhausted, Aborted)

IdentityOf = Callable[[str], Identity | None]


class Entrance(Protocol):
    """Another way in than the bus, for as long as the service is served."""

    def shut(self) -> None:
        """Let nobody new in."""
        ...

    async def leave(self) -> None:
        """Send what is answered, and end every connection."""
        ...


class Request:
    """One request in hand. `late` is set when its deadline has passed and its task was cancelled for it."""

    __slots__ = ("back", "context", "data", "endpoint", "late", "task")

    def __init__(self, endpoint: Endpoint, data: bytes, back: Back, ctx: Context) -> None:
        self.endpoint = endpoint
        self.data = data
        self.back = back
        self.context = ctx
        self.late = False
        self.task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return f"{self.endpoint.contract.service}.{self.endpoint.name}"

    def expire(self) -> None:
        self.late = True
        if self.task is not None:
            self.task.cancel()


class Server:
    """Serves one implementation of a contract until it is drained.

    service, owner: the contract's. node, token: what stands for the node and for `instance` in subjects.
    """

    def __init__(
        self, transport: Transport, implementation: Contract, *, node: str, instance: str, identity_of: IdentityOf,
        metadata: dict[str, str],
    ) -> None:  # fmt: skip
        self._transport = transport
        self._contract = type(implementation)
        self.service, self.owner = self._contract.service, self._contract.owner
        self.node = subjects.encode_token(node, "node")
        self.instance = instance
        self.token = subjects.encode_token(instance, "instance")
        self._prefix = f"{subjects.RPC}.{self.node}"
        self._identity_of = identity_of
        self._endpoints = self._contract.endpoints
        for name, endpoint in self._endpoints.items():
            if getattr(self._contract, name) is endpoint.function:
                raise Unimplemented(f"{self._contract.__name__} does not implement {self._contract.service}.{name}")
        self._methods = {name: getattr(implementation, name) for name in self._endpoints}
        self._immediate = {name for name, method in self._methods.items() if hasattr(method, IMMEDIATE)}
        self._card = Card(self._contract, node=node, prefix=self._prefix, instance=instance, metadata=metadata)
        self._loop = asyncio.get_running_loop()
        self._subscriptions: list[Subscription] = []
        self._routes: dict[str, tuple[Endpoint, str]] = {}
        self._running: set[Request] = set()
        self._waits: set[Request] = set()
        self._shares = Shares(), Shares()  # of what runs, and of what may wait for long
        self._backlog = Backlog[Request]()
        self._answers = Answers()
        self._audit = Audit(transport, self.node, self.service)
        self._draining = False
        self.entrance: Entrance | None = None

    async def start(self) -> None:
        """Subscribe: from here on requests are answered. PermissionDenied when this user may not serve that."""
        service = self._contract.service
        prefix = f"{self._prefix}.*.{service}.*"
        subscribe = self._transport.subscribe
        wanted = [subscribe(subject, self._discovery(answer)) for subject, answer in self._card.subjects()]
        wanted.append(subscribe(f"{prefix}.{self.token}", self._on_message))
        wanted.append(subscribe(prefix, self._on_message, queue=service))
        made = await asyncio.gather(*wanted, return_exceptions=True)
        self._subscriptions = [s for s in made if not isinstance(s, BaseException)]
        refused = next((s for s in made if isinstance(s, BaseException)), None)
        if refused is not None:
            await self.drain(0.0)
            raise refused

    async def drain(self, timeout: float = 10.0) -> None:
        """Take no more requests, let the running ones end, and send the waiting ones elsewhere.

        What the bus has handed over by now is answered too, with the request to ask another.
        """
        self._draining = True
        if self.entrance is not None:
            self.entrance.shut()
        await asyncio.gather(*(s.drain() for s in self._subscriptions), return_exceptions=True)
        self._subscriptions = []
        while (waiting := self._backlog.take(lambda who: True)) is not None:
            self._finish(waiting, _stopping())
        await asyncio.sleep(0)  # a task that never ran could not answer its cancellation
        await self._end(self._waits, 0.0)
        await self._end(self._running, timeout)
        if self.entrance is not None:
            await self.entrance.leave()

    @staticmethod
    async def _end(requests: set[Request], patience: float) -> None:
        tasks = {r.task for r in requests if r.task is not None}
        if tasks and patience > 0:
            _, tasks = await asyncio.wait(tasks, timeout=patience)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    @property
    def stats(self) -> Mapping[str, Stats]:
        """What was answered so far, by operation."""
        return self._card.counted

    @property
    def refused(self) -> Stats:
        """What came in and reached no operation."""
        return self._card.refused

    @property
    def in_hand(self) -> tuple[int, int, int]:
        """How many requests run, how many of those that may wait for long do, and how many have to wait their turn."""
        return len(self._running), len(self._waits), len(self._backlog)

    # ---- a request comes in

    def _on_message(self, message: Message) -> None:
        if not message.reply:
            return
        identity = self._identity_of(message.reply)
        if identity is None:
            unknown = Unauthenticated("the reply is wanted outside every known inbox: dropped")
            self._audit.refused(None, message.subject, unknown)
            return
        self.take(message, identity, self._transport)

    def serves(self, subject: str) -> bool:
        """Whether requests on `subject` are this process's; of what the bus brings it is so by subscription."""
        if subject in self._routes:
            return True
        parts = subject.split(".")
        ours = ".".join(parts[:4]) == self._prefix and len(parts) in (7, 8) and parts[5] == self._contract.service
        return ours and parts[7:] in ([], [self.token])

    def take(self, message: Message, identity: Identity, way: Publisher) -> None:
        """One request of a known caller, to be answered by `way`."""
        back = way, message.reply
        try:
            request = self._admit(message, identity, back)
        except WherryError as e:
            self._card.refuse(e)
            if isinstance(e, PermissionDenied):
                self._audit.refused(identity, message.subject, e)
            self._send(back, error_answer(e))
            return
        ctx = request.context
        late = time.time() - ctx.deadline if ctx.deadline else -1.0
        if late >= 0:  # no command runs late; its caller has given up, or goes by another clock, which it has to know
            error = DeadlineExceeded(
                f"{request.name}: the deadline was {late:.1f} s before it came; do the clocks agree?"
            )
            self._card.refuse(error)
            self._send(back, error_answer(error))
            return
        kept = self._answers.kept(ctx.key) if ctx.key else None
        if kept is not None:
            self._send(back, kept)
        elif self._draining:
            self._send(back, _stopping())
        elif request.endpoint.name in self._immediate:
            self._answer_now(request)
        elif not ctx.key or self._answers.first(ctx.key, back):
            self._schedule(request)

    def _admit(self, message: Message, identity: Identity, back: Back) -> Request:
        """The request with its context; every token is validated again."""
        endpoint, namespace = self._routes.get(message.subject) or self._route(message.subject)
        if identity.namespace and namespace != identity.namespace:
            raise PermissionDenied(f"{identity.name} may not act in namespace {namespace!r}")
        headers = message.headers or {}
        key = headers.get(KEY, "")
        if len(key) > KEY_MAX:
            raise InvalidArgument(f"{KEY} is longer than {KEY_MAX} characters")
        if key:
            key = f"{identity.name}/{namespace}/{endpoint.name}/{key}" if endpoint.mutates or endpoint.waits else ""
        return Request(endpoint, message.data, back, Context(
            namespace, headers.get(LEASE, ""), _deadline(headers.get(DEADLINE)), identity, key, headers.get(TRACE, ""),
            endpoint.encode_reply,
        ))  # fmt: skip

    def _route(self, subject: str) -> tuple[Endpoint, str]:
        """The endpoint and the namespace that a subject stands for."""
        contract, parts = self._contract, subject.split(".")
        token, method = parts[4], parts[6]
        endpoint = self._endpoints.get(method)
        if endpoint is None:
            raise Unimplemented(f"{contract.service} {contract.version} has no operation {method[:76]!r}")
        if token == context.NO_NAMESPACE:
            if contract.namespaced:
                raise InvalidArgument(f"{contract.service}.{method}: namespace is required")
            namespace = token
        elif contract.namespaced is False:
            raise InvalidArgument(f"{contract.service}.{method} belongs to no namespace")
        else:
            namespace = subjects.decode_token(token, "namespace")
        if len(self._routes) >= _ROUTES_MAX:
            self._routes.clear()
        self._routes[subject] = endpoint, namespace
        return endpoint, namespace

    # ---- it runs

    def _answer_now(self, request: Request) -> None:
        """Run an operation that never waits, here: a task and a timer would cost as much as all the rest."""
        started = time.perf_counter_ns()
        error: WherryError | None = None
        token = context.enter(request.context)
        try:
            answer: Answer = (request.endpoint.encode_reply(self._run_through(request)), None)
        except WherryError as e:
            error, answer = e, error_answer(e)
        except Exception:
            error, answer = self._failed(request)
        finally:
            context.leave(token)
        self._card.count(request.endpoint.name, time.perf_counter_ns() - started, error)
        self._send(request.back, answer)

    def _run_through(self, request: Request) -> Any:
        call = self._methods[request.endpoint.name](**request.endpoint.decode_request(request.data))
        try:
            call.send(None)
        except StopIteration as end:
            return end.value
        call.close()
        raise RuntimeError(f"{request.name} is declared immediate, and waits")

    def _schedule(self, request: Request) -> None:
        who, waits, size = request.context.identity, request.endpoint.waits, len(request.data)
        if self._shares[waits].fits(who, WAITS_MAX if waits else RUNNING_MAX):
            self._spawn(self._waits if waits else self._running, request)
        elif not waits and self._backlog.fits(who, size, BACKLOG_MAX, BACKLOG_BYTES):
            self._backlog.put(who, size, request)
        else:
            error = ResourceExhausted(f"{self._contract.service}: too many requests")
            self._card.refuse(error)
            self._finish(request, error_answer(error), error)

    def _spawn(self, group: set[Request], request: Request) -> None:
        group.add(request)
        self._shares[request.endpoint.waits].take(request.context.identity)
        request.task = self._loop.create_task(self._run(group, request))

    async def _run(self, group: set[Request], request: Request) -> None:
        started = time.perf_counter_ns()
        context.enter(request.context)
        timer = self._loop.call_later(request.context.remaining(request.endpoint.timeout), request.expire)
        error: WherryError | None = None
        try:
            arguments = request.endpoint.decode_request(request.data)
            value = await self._methods[request.endpoint.name](**arguments)
            answer: Answer = (request.endpoint.encode_reply(value), None)
        except Replayed as e:
            answer = (e.reply, None)
        except WherryError as e:
            error, answer = e, error_answer(e)
        except asyncio.CancelledError:
            error, answer = self._cancelled(request)
        except Exception:
            error, answer = self._failed(request)
        timer.cancel()
        group.discard(request)
        self._shares[request.endpoint.waits].give(request.context.identity)
        self._card.count(request.endpoint.name, time.perf_counter_ns() - started, error)
        self._finish(request, answer, error)
        error = None  # it holds this frame, which would hold it
        if self._backlog:
            self._next()

    def _cancelled(self, request: Request) -> tuple[WherryError, Answer]:
        if request.late:
            late = DeadlineExceeded(f"{request.name}: the deadline passed")
            return late, error_answer(late)
        if self._draining:
            return Unavailable("the service is stopping"), _stopping()
        return self._failed(request)  # its own work was cancelled under it

    @staticmethod
    def _failed(request: Request) -> tuple[WherryError, Answer]:
        log.exception("%s failed", request.name)
        error = Internal(f"{request.name}: internal error, see the service's log")
        return error, error_answer(error)

    def _next(self) -> None:
        """Fill the free places from the backlog; what has become late there is let go."""
        while (request := self._backlog.take(lambda who: self._shares[False].fits(who, RUNNING_MAX))) is not None:
            if request.context.deadline and request.context.deadline <= time.time():
                self._answers.settle(request.context.key, None)
            else:
                self._spawn(self._running, request)

    # ---- the answer goes out

    def _finish(self, request: Request, answer: Answer, error: WherryError | None = None) -> None:
        """Answer everybody who waits for it."""
        if isinstance(error, PermissionDenied):
            self._audit.refused(request.context.identity, self._subject(request), error)
        key = request.context.key
        if not key:
            self._send(request.back, answer)
            return
        transient = isinstance(error, _TRANSIENT) or (answer[1] is not None and RETRY in answer[1])
        for back in self._answers.settle(key, None if transient else answer):
            self._send(back, answer)

    def _subject(self, request: Request) -> str:
        token = subjects.namespace_token(request.context.namespace)
        return f"{self._prefix}.{token}.{self.service}.{request.endpoint.name}"

    def _send(self, back: Back, answer: Answer) -> None:
        data, headers = answer
        way, reply = back
        try:
            if len(data) > way.max_payload:
                error = ResourceExhausted(f"the answer of {len(data)} bytes is larger than a message may be")
                data, headers = error_answer(error)
            way.publish(reply, data, headers=headers)
        except WherryError as e:
            log.info("an answer could not be sent, its caller will ask again: %s", e)

    def _discovery(self, answer: Callable[[], dict[str, Any]]) -> Callable[[Message], None]:
        def reply(message: Message) -> None:
            # An answer to somewhere else would be a message that its sender may not publish itself.
            if message.reply and self._identity_of(message.reply) is not None:
                self._send((self._transport, message.reply), (json.dumps(answer()).encode(), None))

        return reply


def _deadline(header: str | None) -> float:
    """The time that a header says, 0 for none. InvalidArgument when it says none."""
    if header is None:
        return 0.0
    try:
        deadline = float(header)
    except ValueError:
        deadline = -1.0
    if not 0 <= deadline < float("inf"):
        raise InvalidArgument(f"{DEADLINE} {header[:40]!r} is not a time")
    return min(deadline, time.time() + DEADLINE_MAX)


def _stopping() -> Answer:
    body, headers = error_answer(Unavailable("the service is stopping"))
    return body, {**(headers or {}), RETRY: "1"}


def error_answer(error: WherryError) -> Answer:
    """An error as an answer: its text in one line of the header, and exactly in the body if that is something else.

    Control characters cannot stand in a header, blanks around a value are none of it, and 2 KiB say enough there.
    """
    text = str(error)
    line = "".join(c if c.isprintable() else " " for c in text[:ERROR_LINE_MAX]).strip()
    body = b"" if line == text else text.encode("utf-8", "backslashreplace")[:ERROR_MAX]
    return body, {ERROR: line, ERROR_CODE: str(error.code)}
