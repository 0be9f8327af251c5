"""What a container wrote while nobody listened: its log, in windows over the bus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from wherry_shared.errors import DeadlineExceeded, FailedPrecondition, NotFound, ResourceExhausted, Unavailable

if TYPE_CHECKING:
    from .client import Client

PATIENCE = 10.0


@dataclass(frozen=True)
class LogLine:
    """A line of a log. stamp: when it was written, RFC 3339 with nanoseconds, in UTC. text: without its line's end.

    stream: `stdout` or `stderr`, and "" where lines were rotated away before they were read. partial: the next line of
    its stream continues this one.
    """

    stamp: str
    stream: str
    text: bytes
    partial: bool = False

    @property
    def time(self) -> datetime:
        """When it was written, to the microsecond."""
        return datetime.fromisoformat(self.stamp[:26] + "+00:00")


def parse(lines: bytes) -> Iterator[LogLine]:
    """Whole lines as the node keeps them; what is none is passed over."""
    for line in lines.split(b"\n"):
        words = line.split(b" ", 3)
        if len(words) == 4:
            stamp, stream, tag, text = words
            yield LogLine(stamp.decode("latin-1"), stream.decode("latin-1"), text, tag == b"P")


async def logs(
    client: Client, container_id: str, *, follow: bool, since: datetime | None, until: datetime | None, tail: int
) -> AsyncIterator[LogLine]:
    """The lines of a container's log; with `follow` until the container has ended and all is read."""
    after, stamp, pause = "", "", 0.05
    while True:
        try:
            window = await client.tasks.logs(
                container_id, after, since, until, tail, PATIENCE if follow and after else 0.0
            )  # fmt: skip
        except (Unavailable, DeadlineExceeded, ResourceExhausted):
            if not follow:
                raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)
            continue
        except (NotFound, FailedPrecondition):
            if not after:
                raise
            return  # it was removed, and its log with it
        pause = 0.05
        if window.gap:
            yield LogLine(stamp, "", b"[lines lost]")
        for line in parse(window.lines):
            stamp = line.stamp
            yield line
        if window.ended or not (follow or window.lines):
            return
        after = window.next
