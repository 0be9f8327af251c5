"""What is known of the request in hand: its namespace, who asks, until when, under which lease and key.

A service reads `current()`; a client, or a service that calls another, narrows it with `use(...)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import FailedPrecondition

NO_NAMESPACE = "_"
"""Stands in the subject where a call belongs to no namespace; it is no valid identifier."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is on the other end: the user's name on the bus and the role it was made for."""

    name: str
    role: str
    namespace: str = ""

    @property
    def is_admin(self) -> bool:
        return self.role == "admin"


ANYONE = Identity("", "")


class Replayed(Exception):
    """Raised out of a mutation whose key has taken effect before; carries the encoded answer of then."""

    def __init__(self, reply: bytes) -> None:
        super().__init__("replayed")
        self.reply = reply


class Context(NamedTuple):
    """One request's context.

    deadline: unix time in seconds, 0 for none. key: the idempotency key of the request in hand, "" for none; encode:
    how its answer is encoded, for whoever records it durably under that key. call_key: the key that calls made from
    here shall carry, "" for a fresh one each.
    """

    namespace: str = ""
    lease: str = ""
    deadline: float = 0.0
    identity: Identity = ANYONE
    key: str = ""
    trace: str = ""
    encode: Callable[[Any], bytes] | None = None
    call_key: str = ""

    def remaining(self, default: float) -> float:
        """Seconds until the deadline, never below zero; `default` when there is none."""
        return max(0.0, self.deadline - time.time()) if self.deadline else default


_current: ContextVar[Context] = ContextVar("wherry_context", default=Context())  # noqa: B039 - frozen


def current() -> Context:
    """The context of the request in hand; an empty one outside of any."""
    return _current.get()


def namespace() -> str:
    """The namespace of the request in hand. FailedPrecondition when there is none."""
    ns = _current.get().namespace
    if not ns or ns == NO_NAMESPACE:
        raise FailedPrecondition("namespace is required")
    return ns


def enter(context: Context) -> Token[Context]:
    """Make `context` current (the server's edge: a request is a task of its own, or is left again)."""
    return _current.set(context)


def leave(token: Token[Context]) -> None:
    """Go back to what was current before `enter`."""
    _current.reset(token)


@contextmanager
def use(
    *, namespace: str | None = None, lease: str | None = None, timeout: float | None = None, key: str | None = None
) -> Iterator[Context]:
    """Narrow the context for the calls inside: another namespace or lease, a nearer deadline (seconds from now).

    A deadline is never moved outwards. key: the idempotency key of the mutations called inside; the one of the request
    in hand is never handed on, since it names that request's own effect.
    """
    old = _current.get()
    deadline = old.deadline
    if timeout is not None:
        deadline = min(deadline, time.time() + timeout) if deadline else time.time() + timeout
    new = old._replace(
        namespace=old.namespace if namespace is None else namespace,
        lease=old.lease if lease is None else lease,
        deadline=deadline,
        call_key=old.call_key if key is None else key,
    )
    token = _current.set(new)
    try:
        yield new
    finally:
        _current.reset(token)
