"""The client's half of a call: encode, send, wait, send again while nobody answers, decode or raise."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, TypeVar

from .. import context
from ..contract import Endpoint
from ..errors import DeadlineExceeded, Unavailable, WherryError, from_code
from ..values import Page
from . import subjects
from .transport import Lost, Message, NoResponders, Transport

if TYPE_CHECKING:
    from . import Bus

P = TypeVar("P")
T = TypeVar("T")

DEADLINE, KEY, LEASE, TRACE = "Wherry-Deadline", "Wherry-Key", "Wherry-Lease", "traceparent"
RETRY = "Wherry-Retry"
ERROR, ERROR_CODE = "Nats-Service-Error", "Nats-Service-Error-Code"

# A request that got lost with its service is sent again after this long: 2 s, then 4, then 8.
FIRST_ATTEMPT, LAST_ATTEMPT = 2.0, 8.0
# Who knows that nobody answers does not ask once more with less time than this: what is cut off by the deadline may
# have taken effect, for all that the caller is told then.
LEAST_LEFT = 0.02
_SUBJECTS_MAX = 1024
_token = random.SystemRandom().getrandbits


def fresh_key() -> str:
    """An idempotency key that nobody else has. The time comes first: keys of one moment lie together where they are
    kept, and a transaction of many changes few pages."""
    return f"{time.time_ns() // 1_000_000:012x}{_token(80):020x}"


class Caller:
    """Calls the operations of contracts over a transport."""

    def __init__(self, bus: Bus, *, node: str, namespace: str, instance: str) -> None:
        self._transport: Transport = bus.transport
        self._node = node
        self._namespace = namespace
        self._instance = instance
        self._subjects: dict[tuple[Endpoint, str], str] = {}

    def at(self, instance: str) -> Caller:
        """The same caller, bound to one replica."""
        bound = copy(self)
        bound._instance = instance
        bound._subjects = {}
        return bound

    @property
    def namespace(self) -> str:
        """The namespace that its calls are made in."""
        return self._namespace or context.namespace()

    async def call(self, endpoint: Endpoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation, until its deadline."""
        message = await self._ask(endpoint, *self._request(endpoint, args, kwargs))
        return endpoint.decode_reply(message.data)

    async def exchange(self, endpoint: Endpoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """The same; its answer as it came."""
        return (await self._ask(endpoint, *self._request(endpoint, args, kwargs))).data

    def _request(
        self, endpoint: Endpoint, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, bytes, dict[str, str], float]:
        """The subject, body and headers of a call, and its deadline."""
        now = context.current()
        body = endpoint.encode_request(args, kwargs)
        subject = self._subject(endpoint, now)
        deadline = now.deadline or time.time() + endpoint.timeout
        headers = {DEADLINE: f"{deadline:.3f}"}
        if endpoint.mutates:
            headers[KEY] = now.call_key or fresh_key()
        elif endpoint.waits:  # sent again, it joins the one under way
            headers[KEY] = fresh_key()
        if now.lease:
            headers[LEASE] = now.lease
        if now.trace:
            headers[TRACE] = now.trace
        return subject, body, headers, deadline

    def _subject(self, endpoint: Endpoint, now: context.Context) -> str:
        namespace = self._namespace or now.namespace
        subject = self._subjects.get((endpoint, namespace))
        if subject is None:
            contract = endpoint.contract
            token = subjects.namespace_of(contract.namespaced, namespace, f"{contract.service}.{endpoint.name}")
            subject = subjects.rpc(self._node, token, contract.service, endpoint.name, self._instance)
            if len(self._subjects) >= _SUBJECTS_MAX:
                self._subjects.clear()
            self._subjects[endpoint, namespace] = subject
        return subject

    async def _ask(
        self, endpoint: Endpoint, subject: str, body: bytes, headers: dict[str, str], deadline: float
    ) -> Message:
        """Send until there is an answer. The same key makes a second delivery of a mutation harmless."""
        attempt = LAST_ATTEMPT if endpoint.waits else FIRST_ATTEMPT
        pause = 0.02
        # What is raised at the deadline; once a request went unanswered, nobody knows whether it took effect.
        reason: WherryError | None = None
        unanswered = False
        while (left := deadline - time.time()) > (0.0 if reason is None else LEAST_LEFT):
            try:
                message = await self._transport.request(subject, body, headers=headers, timeout=min(left, attempt))
            except NoResponders:
                gone = f"its instance {self._instance} is gone" if self._instance else "no service answers on the bus"
                reason = Unavailable(f"{_name(endpoint)}: {gone}")
            except DeadlineExceeded:
                unanswered = True
                attempt = min(attempt * 2, LAST_ATTEMPT)
                continue
            except Lost:  # with its process; the bus may take a moment to know that too
                unanswered = True
                await asyncio.sleep(min(pause, left))
                pause = min(pause * 2, 0.25)
                continue
            else:
                if not (answer := message.headers) or not (reason := raise_error(answer, message.data)):
                    return message
            if self._instance:
                raise reason
            await asyncio.sleep(min(pause * (0.5 + random.random()), left))  # noqa: S311 - jitter
            pause = min(pause * 2, 0.25)
        if reason is None or unanswered:
            raise DeadlineExceeded(f"{_name(endpoint)}: no answer within the deadline")
        raise reason


def _name(endpoint: Endpoint) -> str:
    return f"{endpoint.contract.service}.{endpoint.name}"


def raise_error(headers: Mapping[str, str], data: bytes = b"") -> Unavailable | None:
    """Raise the error that an answer carries; return it when its service is stopping and another may answer.

    The header has the error's text in one line; the body has it exactly, where that is something else.
    """
    code = headers.get(ERROR_CODE)
    if code is None:
        return None
    text = data.decode("utf-8", "replace") if data else headers.get(ERROR, "")
    error = from_code(int(code) if code.isdecimal() and len(code) < 4 else 2, text)
    if RETRY in headers and isinstance(error, Unavailable):
        return error
    raise error


def make_proxy(contract: type[Any], caller: Caller) -> Any:
    """An object with the contract's methods, each a call over the bus."""
    proxy = proxy_class(contract)()
    proxy._caller = caller
    return proxy


def at_instance(proxy: P, instance: str) -> P:
    """The same proxy, bound to one replica. What is no proxy is the service itself, and its own only instance."""
    caller = getattr(proxy, "_caller", None)
    if not isinstance(caller, Caller):
        return proxy
    made: P = type(proxy)()
    made._caller = caller.at(instance)  # type: ignore[attr-defined]
    return made


async def walk(window: Callable[..., Awaitable[Page[T]]], **arguments: Any) -> AsyncIterator[Page[T]]:
    """Every page of a proxy's walk (`client.images.walk`), each asked for before the one before it is decoded."""
    proxy: Any = window.__self__  # type: ignore[attr-defined]
    caller: Caller = proxy._caller
    endpoint: Endpoint = proxy.endpoints[window.__name__]
    answer = await caller.exchange(endpoint, (), arguments)
    while following := endpoint.following(answer):
        coming = asyncio.ensure_future(caller.exchange(endpoint, (), {**arguments, "after": following}))
        try:
            await asyncio.sleep(0)  # it leaves now
            yield endpoint.decode_reply(answer)
            answer = await coming
        finally:
            coming.cancel()
    yield endpoint.decode_reply(answer)


_classes: dict[type[Any], type[Any]] = {}


def proxy_class(contract: type[Any]) -> type[Any]:
    """What the contract's proxies are instances of; made when it is first asked for."""
    made = _classes.get(contract)
    if made is None:
        methods = {name: _method(endpoint) for name, endpoint in contract.endpoints.items()}
        made = _classes[contract] = type(f"{contract.__name__}Proxy", (contract,), methods)
    return made


def _method(endpoint: Endpoint) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._caller.call(endpoint, args, kwargs)

    call.__name__, call.__doc__ = endpoint.name, endpoint.doc
    return call
