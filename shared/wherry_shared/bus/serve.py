"""The service's half of a call: a task per request behind a bound, its context, its answer or its error.

Who asks is known from the reply subject: each user's inbox prefix is a secret between it and the services, and the
bus lets nobody else subscribe to it. A request whose reply is in no known inbox is dropped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from .. import context
from ..context import Context, Identity, Replayed
from ..contract import Contract, Endpoint
from ..errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    WherryError,
)  # fmt: skip
from . import subjects
from .proxy import DEADLINE, ERROR, ERROR_CODE, KEY, LEASE, RETRY, TRACE
from .transport import Message, Subscription, Transport

log = logging.getLogger("wherry.serve")

RUNNING_MAX = 256
BACKLOG_MAX = 8192
# Answers of mutations are kept this long, so that a second delivery of the same key gets the same one.
REMEMBER_SECONDS = 120.0
REMEMBER_MAX = 4096

IdentityOf = Callable[[str], Identity | None]


@dataclass
class Stats:
    """What `$SRV.STATS` tells of one endpoint."""

    requests: int = 0
    errors: int = 0
    last_error: str = ""
    nanoseconds: int = 0


@dataclass
class Pending:
    """A mutation under way or done: who waits for the answer, and the answer."""

    waiting: list[str] = field(default_factory=list)
    answer: tuple[bytes, dict[str, str] | None] | None = None
    at: float = 0.0


class Server:
    """Serves one implementation of a contract until it is drained."""

    def __init__(
        self, transport: Transport, implementation: Contract, *, node: str, instance: str, identity_of: IdentityOf,
        metadata: dict[str, str],
    ) -> None:  # fmt: skip
        self._transport = transport
        self._implementation = implementation
        self._contract = type(implementation)
        self._node = node
        self.instance = instance
        self._identity_of = identity_of
        self._metadata = metadata
        self._endpoints = self._contract.endpoints
        for name, endpoint in self._endpoints.items():
            if getattr(self._contract, name) is endpoint.function:
                raise Unimplemented(f"{self._contract.__name__} does not implement {self._contract.service}.{name}")
        self._methods = {name: getattr(implementation, name) for name in self._endpoints}
        self._stats = {name: Stats() for name in self._endpoints}
        self._started = datetime.now(UTC).isoformat()
        self._subscriptions: list[Subscription] = []
        self._running = 0
        self._backlog: deque[tuple[Endpoint, Message, Context]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waits: set[asyncio.Task[None]] = set()
        self._pending: dict[str, Pending] = {}
        self._draining = False

    async def start(self) -> None:
        """Subscribe: from here on requests are answered."""
        service = self._contract.service
        prefix = f"{subjects.RPC}.{subjects.encode_token(self._node, 'node')}.*.{service}.*"
        subscribe = self._transport.subscribe
        for verb, answer in (("PING", self._ping), ("INFO", self._info), ("STATS", self._statistics)):
            for subject in (f"$SRV.{verb}", f"$SRV.{verb}.{service}", f"$SRV.{verb}.{service}.{self.instance}"):
                self._subscriptions.append(await subscribe(subject, self._discovery(answer)))
        self._subscriptions.append(await subscribe(f"{prefix}.{self.instance}", self._on_message))
        self._subscriptions.append(await subscribe(prefix, self._on_message, queue=service))

    async def drain(self, timeout: float = 10.0) -> None:
        """Take no more requests, let the running ones end, and send the waiting ones elsewhere."""
        self._draining = True
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        for task in self._waits:
            task.cancel()
        rest = self._tasks | self._waits
        if rest:
            _, late = await asyncio.wait(rest, timeout=timeout)
            for task in late:
                task.cancel()

    # ---- a request comes in

    def _on_message(self, message: Message) -> None:
        if not message.reply:
            return
        identity = self._identity_of(message.reply)
        if identity is None:
            log.warning("request on %s with a reply outside every known inbox: dropped", message.subject)
            return
        try:
            endpoint, ctx = self._admit(message, identity)
        except WherryError as e:
            self._answer_error([message.reply], e)
            return
        if ctx.deadline and ctx.deadline <= time.time():
            return  # its caller has given up: no command runs late
        if self._draining:
            self._answer_error([message.reply], Unavailable("the service is stopping"), retry=True)
        elif not endpoint.mutates or self._first_delivery(ctx, message.reply):
            self._schedule(endpoint, message, ctx)

    def _admit(self, message: Message, identity: Identity) -> tuple[Endpoint, Context]:
        """The endpoint and the context of a request; every token is validated again."""
        parts = message.subject.split(".")
        token, method = parts[4], parts[6]
        endpoint = self._endpoints.get(method)
        if endpoint is None:
            raise Unimplemented(f"{self._contract.service} {self._contract.version} has no operation {method!r}")
        namespace = token
        if token == context.NO_NAMESPACE:
            if self._contract.namespaced:
                raise InvalidArgument(f"{self._contract.service}.{method}: namespace is required")
        elif self._contract.namespaced is False:
            raise InvalidArgument(f"{self._contract.service}.{method} belongs to no namespace")
        else:
            namespace = subjects.decode_token(token, "namespace")
        if identity.namespace and namespace != identity.namespace:
            raise PermissionDenied(f"{identity.name} may not act in namespace {namespace!r}")
        headers = message.headers or {}
        key = headers.get(KEY, "")
        try:
            deadline = float(headers.get(DEADLINE, "0"))
        except ValueError:
            raise InvalidArgument(f"{DEADLINE} is not a time") from None
        if len(key) > 128:
            raise InvalidArgument(f"{KEY} is longer than 128 characters")
        return endpoint, Context(
            namespace=namespace, lease=headers.get(LEASE, ""), deadline=deadline, identity=identity,
            key=f"{identity.name}/{token}/{method}/{key}" if key and endpoint.mutates else "",
            trace=headers.get(TRACE, ""), encode=endpoint.encode_reply,
        )  # fmt: skip

    def _first_delivery(self, ctx: Context, reply: str) -> bool:
        """Whether this key is new. A known one gets the answer of its first delivery, now or when there is one."""
        if not ctx.key:
            return True
        known = self._pending.get(ctx.key)
        if known is None:
            self._forget_old()
            self._pending[ctx.key] = Pending(waiting=[reply])
            return True
        if known.answer is None:
            known.waiting.append(reply)
        else:
            self._send(reply, *known.answer)
        return False

    def _forget_old(self) -> None:
        """Insertion order is age: drop from the front what is answered and old, or over the bound."""
        limit = time.monotonic() - REMEMBER_SECONDS
        while self._pending:
            key, first = next(iter(self._pending.items()))
            if first.answer is None or (first.at > limit and len(self._pending) < REMEMBER_MAX):
                return
            del self._pending[key]

    # ---- it runs

    def _schedule(self, endpoint: Endpoint, message: Message, ctx: Context) -> None:
        if endpoint.waits:
            self._spawn(self._waits, endpoint, message, ctx)
        elif self._running < RUNNING_MAX:
            self._running += 1
            self._spawn(self._tasks, endpoint, message, ctx)
        elif len(self._backlog) < BACKLOG_MAX:
            self._backlog.append((endpoint, message, ctx))
        else:
            self._pending.pop(ctx.key, None)
            self._answer_error([message.reply], ResourceExhausted(f"{self._contract.service}: too many requests"))

    def _spawn(self, group: set[asyncio.Task[None]], endpoint: Endpoint, message: Message, ctx: Context) -> None:
        task = asyncio.get_running_loop().create_task(self._run(endpoint, message, ctx))
        group.add(task)
        task.add_done_callback(group.discard)

    async def _run(self, endpoint: Endpoint, message: Message, ctx: Context) -> None:
        started = time.perf_counter_ns()
        stats = self._stats[endpoint.name]
        answer: tuple[bytes, dict[str, str] | None]
        try:
            answer = await self._answer(endpoint, message, ctx)
        except Replayed as e:
            answer = (e.reply, None)
        except WherryError as e:
            stats.errors += 1
            stats.last_error = f"{e.code}:{e}"
            answer = (b"", error_headers(e))
        except asyncio.CancelledError:
            answer = (b"", error_headers(Unavailable("the service is stopping"), retry=True))
        finally:
            stats.requests += 1
            stats.nanoseconds += time.perf_counter_ns() - started
            if not endpoint.waits:
                self._next()
        pending = self._pending.get(ctx.key) if ctx.key else None
        if pending is None:
            self._send(message.reply, *answer)
            return
        if answer[1] is not None and RETRY in answer[1]:
            del self._pending[ctx.key]
        pending.answer, pending.at = answer, time.monotonic()
        for reply in pending.waiting:
            self._send(reply, *answer)
        pending.waiting = []

    async def _answer(self, endpoint: Endpoint, message: Message, ctx: Context) -> tuple[bytes, dict[str, str] | None]:
        context.enter(ctx)
        arguments = endpoint.decode_request(message.data)
        try:
            async with asyncio.timeout(ctx.remaining(endpoint.timeout)):
                value = await self._methods[endpoint.name](**arguments)
            return endpoint.encode_reply(value), None
        except TimeoutError:
            raise DeadlineExceeded(f"{self._contract.service}.{endpoint.name}: the deadline passed") from None
        except (WherryError, Replayed):
            raise
        except Exception:
            log.exception("%s.%s failed", self._contract.service, endpoint.name)
            raise Internal(f"{self._contract.service}.{endpoint.name}: internal error, see the service's log") from None

    def _next(self) -> None:
        self._running -= 1
        while self._backlog and self._running < RUNNING_MAX:
            endpoint, message, ctx = self._backlog.popleft()
            if ctx.deadline and ctx.deadline <= time.time():
                self._pending.pop(ctx.key, None)
                continue
            self._running += 1
            self._spawn(self._tasks, endpoint, message, ctx)

    # ---- the answer goes out

    def _answer_error(self, replies: list[str], error: WherryError, *, retry: bool = False) -> None:
        for reply in replies:
            self._send(reply, b"", error_headers(error, retry=retry))

    def _send(self, reply: str, data: bytes, headers: dict[str, str] | None) -> None:
        try:
            if len(data) > self._transport.max_payload:
                error = ResourceExhausted(f"the answer of {len(data)} bytes is larger than a message may be")
                data, headers = b"", error_headers(error)
            self._transport.publish(reply, data, headers=headers)
        except Unavailable:
            log.info("an answer found no connection; its caller will ask again")

    # ---- NATS micro discovery (ADR-32)

    def _discovery(self, answer: Callable[[], dict[str, Any]]) -> Callable[[Message], None]:
        def reply(message: Message) -> None:
            if message.reply:
                self._send(message.reply, json.dumps(answer()).encode(), None)

        return reply

    def _identity(self, kind: str) -> dict[str, Any]:
        return {
            "type": f"io.nats.micro.v1.{kind}_response",
            "name": self._contract.service,
            "id": self.instance,
            "version": self._contract.version,
            "metadata": {**self._metadata, "node": self._node, "pid": str(os.getpid())},
        }

    def _ping(self) -> dict[str, Any]:
        return self._identity("ping")

    def _info(self) -> dict[str, Any]:
        endpoints = [
            {
                "name": name,
                "subject": f"{subjects.RPC}.{self._node}.*.{self._contract.service}.{name}",
                "queue_group": self._contract.service,
                "metadata": {"schema": json.dumps(endpoint.request.model_json_schema(), separators=(",", ":"))},
            }
            for name, endpoint in self._endpoints.items()
        ]
        declared = next(iter(self._endpoints.values())).contract
        description = (declared.__doc__ or "").strip()
        return {**self._identity("info"), "description": description, "endpoints": endpoints}

    def _statistics(self) -> dict[str, Any]:
        endpoints = [
            {
                "name": name,
                "subject": f"{subjects.RPC}.{self._node}.*.{self._contract.service}.{name}",
                "queue_group": self._contract.service,
                "num_requests": s.requests,
                "num_errors": s.errors,
                "last_error": s.last_error,
                "processing_time": s.nanoseconds,
                "average_processing_time": s.nanoseconds // max(1, s.requests),
            }
            for name, s in self._stats.items()
        ]
        return {**self._identity("stats"), "started": self._started, "endpoints": endpoints}


def error_headers(error: WherryError, *, retry: bool = False) -> dict[str, str]:
    """The headers of an error's answer; control characters cannot stand in a header, and 2 KiB say enough."""
    text = "".join(c if c.isprintable() else " " for c in str(error))[:2048]
    headers = {ERROR: text, ERROR_CODE: str(error.code)}
    if retry:
        headers[RETRY] = "1"
    return headers
