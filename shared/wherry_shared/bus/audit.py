"""The audit: who was refused what, as one JSON object on `wherry.audit.v1.<node>.<ns>.<service>`.

It says who asked, for which operation, and what came of it; never what was sent along. What nats-server itself
refuses reaches no service, and stands in that server's log. Told once and not waited for: whoever wants to keep it
has the events service make a stream of it (setting `audit`).
"""

from __future__ import annotations

import json
import logging
import time
from typing import Final

from ..context import NO_NAMESPACE, Identity
from ..errors import WherryError
from ..values import now
from . import subjects
from .transport import Publisher

log = logging.getLogger("wherry.serve")

BURST: Final = 100.0  # refusals told at once, by each service
FIELDS: Final = (
    "timestamp", "node", "namespace", "service", "operation", "identity", "role", "outcome", "left_out",
)  # fmt: skip
PER_SECOND: Final = 10.0  # and after that; the next one told says how many were left out


class Audit:
    """One service's refusals. node: as it stands in subjects."""

    def __init__(self, way: Publisher, node: str, service: str) -> None:
        self._way = way
        self._node = node
        self._service = service
        self._room = BURST
        self._at = time.monotonic()
        self._left_out = 0

    def refused(self, identity: Identity | None, subject: str, error: WherryError) -> None:
        """Tell of a request that is not granted. identity: None, when nobody knows whose it is."""
        at = time.monotonic()
        self._room = min(BURST, self._room + PER_SECOND * (at - self._at))
        self._at = at
        if self._room < 1:
            self._left_out += 1
            return
        self._room -= 1
        who = identity or Identity("", "")
        # A subject is the caller's own text: its values are quoted.
        log.warning("refused identity=%s role=%s subject=%a reason=%a", who.name, who.role, subject, error.message)
        self._tell(who, subject, error)

    def _tell(self, who: Identity, subject: str, error: WherryError) -> None:
        tokens = subject.split(".")
        namespace, operation = _namespace(tokens[4]), tokens[6]
        values = (
            now().isoformat(), self._node.replace("~", "."), namespace, self._service, operation[:76], who.name,
            who.role, type(error).__name__, self._left_out,
        )  # fmt: skip
        record = dict(zip(FIELDS, values, strict=True))
        token = subjects.namespace_token(namespace)
        try:
            self._way.publish(f"{subjects.AUDIT}.{self._node}.{token}.{self._service}", json.dumps(record).encode())
            self._left_out = 0
        except WherryError:
            self._left_out += 1  # the bus is away: the log has it


def _namespace(token: str) -> str:
    """What a token of a subject stands for; the one of no namespace where it stands for none."""
    try:
        return subjects.decode_token(token)
    except WherryError:
        return NO_NAMESPACE
