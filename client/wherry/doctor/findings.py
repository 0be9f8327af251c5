"""What an examination finds, and what it looks at."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..client import Client

Severity = Literal["broken", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be. broken: something does not work, or will be lost; warning: it may come to
    that; note: good to know."""

    severity: Severity
    part: str
    what: str
    why: str
    todo: str


@dataclass(frozen=True)
class LeftOut:
    """A part that was not looked at, and why."""

    part: str
    why: str


@dataclass
class Report:
    """All of an examination."""

    findings: list[Finding] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing is broken."""
        return not any(finding.severity == "broken" for finding in self.findings)


@dataclass(frozen=True)
class Place:
    """A node's directories on this host; creds: of the seeds."""

    node: str
    root: Path
    state: Path
    creds: Path


@dataclass
class Patient:
    """A node under examination: what of it can be reached. place: None where its files cannot be looked at.

    answers: what its services told of themselves (`$SRV.STATS`), by name.
    """

    client: Client | None
    place: Place | None
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def bus(self) -> Client:
        """The client, in a check that needs one."""
        assert self.client is not None  # noqa: S101 - a check that needs a service does not run without
        return self.client

    @property
    def here(self) -> Place:
        """The place, in a check that needs one."""
        assert self.place is not None  # noqa: S101 - a check on the host does not run elsewhere
        return self.place


Checking = Callable[[Patient], Awaitable[Iterable[Finding]]]


@dataclass(frozen=True)
class Check:
    """One part of an examination. needs: the services that it asks; here: whether it looks at the node's host."""

    part: str
    look: Checking
    needs: tuple[str, ...] = ()
    here: bool = False


def aside(look: Callable[[Place], Iterator[Finding]]) -> Checking:
    """What looks at files and programs, made a check: in a thread."""

    async def check(patient: Patient) -> Iterable[Finding]:
        return await asyncio.to_thread(lambda: list(look(patient.here)))

    return check
