"""The client's half of a call: encode, send, wait, send again while nobody answers, decode or raise."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, TypeVar

from .. import context
from ..contract import Endpoint
from ..errors import DeadlineExceeded, FailedPrecondition, Unavailable, from_code
from . import subjects
from .transport import Message, NoResponders, Transport

if TYPE_CHECKING:
    from . import Bus

P = TypeVar("P")

DEADLINE, KEY, LEASE, TRACE = "Wherry-Deadline", "Wherry-Key", "Wherry-Lease", "traceparent"
RETRY = "Wherry-Retry"
ERROR, ERROR_CODE = "Nats-Service-Error", "Nats-Service-Error-Code"

# A request that got lost with its service is sent again after this long: 2 s, then 4, then 8.
FIRST_ATTEMPT = 2.0
_token = random.SystemRandom().getrandbits


class Caller:
    """Calls the operations of contracts over a transport."""

    def __init__(self, bus: Bus, *, node: str, namespace: str, instance: str) -> None:
        self._transport: Transport = bus.transport
        self._node = node
        self._namespace = namespace
        self._instance = instance

    def at(self, instance: str) -> Caller:
        """The same caller, bound to one replica."""
        bound = copy(self)
        bound._instance = instance
        return bound

    @property
    def namespace(self) -> str:
        """The namespace that its calls are made in."""
        return self._namespace or context.namespace()

    async def call(self, endpoint: Endpoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation, until its deadline."""
        now = context.current()
        body = endpoint.encode_request(args, kwargs)
        subject = self._subject(endpoint, now)
        deadline = now.deadline or time.time() + endpoint.timeout
        headers = {DEADLINE: f"{deadline:.3f}"}
        if endpoint.mutates:
            headers[KEY] = now.call_key or f"{_token(96):024x}"
        if now.lease:
            headers[LEASE] = now.lease
        if now.trace:
            headers[TRACE] = now.trace
        message = await self._ask(endpoint, subject, body, headers, deadline)
        return endpoint.decode_reply(message.data)

    def _subject(self, endpoint: Endpoint, now: context.Context) -> str:
        contract = endpoint.contract
        if contract.namespaced is False:
            namespace = context.NO_NAMESPACE
        else:
            namespace = self._namespace or now.namespace
            if not namespace and contract.namespaced is None:
                namespace = context.NO_NAMESPACE
            if not namespace:
                raise FailedPrecondition(f"{contract.service}.{endpoint.name}: namespace is required")
        return subjects.rpc(self._node, namespace, contract.service, endpoint.name, self._instance)

    async def _ask(
        self, endpoint: Endpoint, subject: str, body: bytes, headers: dict[str, str], deadline: float
    ) -> Message:
        """Send until there is an answer. The same key makes a second delivery of a mutation harmless."""
        attempt, pause = FIRST_ATTEMPT, 0.02
        name = f"{endpoint.contract.service}.{endpoint.name}"
        while True:
            left = deadline - time.time()
            if left <= 0:
                raise DeadlineExceeded(f"{name}: no answer within the deadline")
            try:
                message = await self._transport.request(
                    subject, body, headers=headers, timeout=left if endpoint.waits else min(left, attempt)
                )
            except NoResponders:
                if self._instance:
                    raise Unavailable(f"{name}: its instance {self._instance} is gone") from None
                if deadline - time.time() <= pause:
                    raise Unavailable(f"{name}: no service answers on the bus") from None
            except DeadlineExceeded:
                attempt = min(attempt * 2, 8.0)
                continue
            else:
                if not message.headers or not (retry := raise_error(message.headers)):
                    return message
                if self._instance or deadline - time.time() <= pause:
                    raise retry
            await asyncio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - jitter
            pause = min(pause * 2, 0.25)


def raise_error(headers: Mapping[str, str]) -> Unavailable | None:
    """Raise the error that an answer carries; return it when its service is stopping and another may answer."""
    code = headers.get(ERROR_CODE)
    if code is None:
        return None
    error = from_code(int(code) if code.isdigit() else 2, headers.get(ERROR, ""))
    if RETRY in headers and isinstance(error, Unavailable):
        return error
    raise error


def make_proxy(contract: type[Any], caller: Caller) -> Any:
    """An object with the contract's methods, each a call over the bus."""
    proxy = _proxy_class(contract)()
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


_classes: dict[type[Any], type[Any]] = {}


def _proxy_class(contract: type[Any]) -> type[Any]:
    made = _classes.get(contract)
    if made is None:
        methods = {name: _method(endpoint) for name, endpoint in contract.endpoints.items()}
        made = _classes[contract] = type(f"{contract.__name__}Proxy", (contract,), methods)
    return made


def _method(endpoint: Endpoint) -> Any:
    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await self._caller.call(endpoint, args, kwargs)

    call.__name__, call.__doc__ = endpoint.name, endpoint.doc
    return call
