"""The subjects: four disjoint roots, and the codec of their tokens.

`wherry.rpc.v1.<node>.<ns>.<service>.<method>[.<instance>]` carries requests, `wherry.ev.v1.<node>.<ns>.<topic...>`
events, `wherry.io.v1...` live stdio, `wherry.audit.v1...` the audit. A dot would split a token, so that of an
identifier travels as `~`, which no identifier contains. Tokens that do not validate are refused, never repaired.
"""

from __future__ import annotations

import functools

from ..context import NO_NAMESPACE
from ..errors import FailedPrecondition, InvalidArgument
from ..values import check_identifier

RPC = "wherry.rpc.v1"
EV = "wherry.ev.v1"
IO = "wherry.io.v1"
AUDIT = "wherry.audit.v1"

TOPIC_MAX = 1024
"""nats-server ends a connection that sends a control line of more than 4 KiB, in which the subject stands."""


def encode_token(identifier: str, what: str = "identifier") -> str:
    """The token of an identifier. InvalidArgument when it is none."""
    return check_identifier(identifier, what).replace(".", "~")


def decode_token(token: str, what: str = "token") -> str:
    """The identifier of a token. InvalidArgument when it stands for none (a literal `*`, say)."""
    return check_identifier(token.replace("~", "."), what)


def namespace_token(namespace: str) -> str:
    """The token of a namespace, or `_` for calls that belong to none."""
    return namespace if namespace == NO_NAMESPACE else encode_token(namespace, "namespace")


def namespace_of(namespaced: bool | None, namespace: str, what: str) -> str:
    """The namespace that a call of a contract is made in: `namespace`, or `_` where it belongs to none.

    namespaced: Contract.namespaced. FailedPrecondition, naming `what`, when the call needs one and there is none.
    """
    if namespaced is False or (namespaced is None and not namespace):
        return NO_NAMESPACE
    if not namespace or (namespaced and namespace == NO_NAMESPACE):
        raise FailedPrecondition(f"{what}: namespace is required")
    return namespace


def rpc(node: str, namespace: str, service: str, method: str, instance: str = "") -> str:
    """The subject of one operation. `instance` names one replica instead of the service's queue group."""
    subject = f"{RPC}.{encode_token(node, 'node')}.{namespace_token(namespace)}.{service}.{method}"
    return f"{subject}.{encode_token(instance, 'instance')}" if instance else subject


def check_topic(topic: str) -> list[str]:
    """The components of a containerd topic (`/tasks/exit`, at most 1024 characters). InvalidArgument: it is none."""
    if not topic.startswith("/") or len(topic) < 2:
        raise InvalidArgument(f"topic {topic[:80]!r} must start with '/' and have a component")
    if len(topic) > TOPIC_MAX:
        raise InvalidArgument(f"topic {topic[:80]!r}... is longer than {TOPIC_MAX} characters")
    return [check_identifier(part, "topic component") for part in topic[1:].split("/")]


@functools.lru_cache(maxsize=1024)
def event(node: str, namespace: str, topic: str) -> str:
    """The subject of an event: topic `/tasks/exit` ends in `tasks.exit`."""
    tokens = ".".join(part.replace(".", "~") for part in check_topic(topic))
    return f"{EV}.{encode_token(node, 'node')}.{encode_token(namespace, 'namespace')}.{tokens}"


def namespace_of_event(subject: str) -> str:
    """The namespace in an event's subject, not validated; "" where there is none."""
    parts = subject.split(".", 5)
    return parts[4].replace("~", ".") if len(parts) == 6 else ""


def matches(pattern: str, subject: str) -> bool:
    """Whether a NATS subscription pattern (`*`, `>`) takes a subject."""
    want, have = pattern.split("."), subject.split(".")
    for i, part in enumerate(want):
        if part == ">":
            return len(have) > i
        if i >= len(have) or part not in ("*", have[i]):
            return False
    return len(want) == len(have)
