"""What a service process tells of itself: the answers of NATS micro discovery (ADR-32)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from ..contract import Contract
from ..errors import ERRORS, WherryError
from ..process import memory


@dataclass(slots=True)
class Stats:
    """What was answered by one endpoint. codes: how many errors of each code."""

    requests: int = 0
    errors: int = 0
    last_error: str = ""
    nanoseconds: int = 0
    codes: list[int] = field(default_factory=lambda: [0] * (max(ERRORS) + 1))

    @property
    def by_class(self) -> dict[str, int]:
        """Those of `codes` that there were, by the names of their classes."""
        return {ERRORS[code].__name__: count for code, count in enumerate(self.codes) if count}

    def fail(self, error: WherryError) -> None:
        """Note an error."""
        self.errors += 1
        self.codes[error.code] += 1
        self.last_error = f"{error.code}:{error}"


class Card:
    """What one service process tells of itself."""

    def __init__(
        self, contract: type[Contract], *, node: str, prefix: str, instance: str, metadata: dict[str, str]
    ) -> None:
        self._contract = contract
        self._prefix = prefix
        self._node = node
        self._instance = instance
        self._metadata = metadata
        self._started = datetime.now(UTC).isoformat()
        self.counted = {name: Stats() for name in contract.endpoints}
        self.refused = Stats()
        """Requests that reached no endpoint: malformed, not allowed, for one that is not there, too many."""

    def subjects(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """The subjects to answer, and with what; a second contract of a process is not told of."""
        if self._contract.owner != self._contract.service:
            return
        for verb, answer in (("PING", self.ping), ("INFO", self.info), ("STATS", self.stats)):
            yield f"$SRV.{verb}", answer
            yield f"$SRV.{verb}.{self._contract.service}", answer
            yield f"$SRV.{verb}.{self._contract.service}.{self._instance}", answer

    def count(self, endpoint: str, nanoseconds: int, error: WherryError | None) -> None:
        """Note one request that was answered."""
        stats = self.counted[endpoint]
        stats.requests += 1
        stats.nanoseconds += nanoseconds
        if error is not None:
            stats.fail(error)

    def refuse(self, error: WherryError) -> None:
        """Note one that reached no endpoint."""
        self.refused.requests += 1
        self.refused.fail(error)

    def ping(self) -> dict[str, Any]:
        return self._identity("ping")

    def info(self) -> dict[str, Any]:
        return {**self._identity("info"), "description": self._description, "endpoints": self._endpoints}

    def stats(self) -> dict[str, Any]:
        endpoints = [
            {
                **self._endpoint(name),
                "num_requests": s.requests,
                "num_errors": s.errors,
                "last_error": s.last_error,
                "processing_time": s.nanoseconds,
                "average_processing_time": s.nanoseconds // max(1, s.requests),
                "data": {"errors": s.by_class},
            }
            for name, s in self.counted.items()
        ]
        taken = memory()
        own = {"rss": taken.rss, "pss": taken.pss, "refused": self.refused.by_class}
        return {**self._identity("stats"), "started": self._started, "endpoints": endpoints, "process": own}

    def _identity(self, kind: str) -> dict[str, Any]:
        return {
            "type": f"io.nats.micro.v1.{kind}_response",
            "name": self._contract.service,
            "id": self._instance,
            "version": self._contract.version,
            "metadata": {**self._metadata, "node": self._node, "pid": str(os.getpid())},
        }

    def _endpoint(self, name: str) -> dict[str, Any]:
        service = self._contract.service
        return {"name": name, "subject": f"{self._prefix}.*.{service}.{name}", "queue_group": service}

    @cached_property
    def _description(self) -> str:
        declared = next(iter(self._contract.endpoints.values())).contract
        return (declared.__doc__ or "").strip()

    @cached_property
    def _endpoints(self) -> list[dict[str, Any]]:
        return [
            {**self._endpoint(name), "metadata": {"schema": endpoint.schema}}
            for name, endpoint in self._contract.endpoints.items()
        ]
