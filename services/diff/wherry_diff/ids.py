"""Id mappings of a snapshot: its upper directory has the host's numbers, a layer the container's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from wherry_shared.errors import InvalidArgument

OVERFLOW = 65534
"""What the container sees of an owner that it has no number for (proc(5), overflowuid)."""
OPTIONS = frozenset({"uidmap", "gidmap"})
_RANGE = re.compile(r"([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})\Z")

Ranges = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Ids:
    """The mapping as ranges of (container's first, host's first, how many)."""

    uids: Ranges
    gids: Ranges

    def inside(self, uid: int, gid: int) -> tuple[int, int]:
        """The container's numbers for an owner on the host."""
        return _inside(self.uids, uid), _inside(self.gids, gid)


def of(options: Mapping[str, str]) -> Ids | None:
    """The mapping that an overlay's options ask for. InvalidArgument: it is malformed."""
    if not OPTIONS & options.keys():
        return None
    return Ids(_ranges(options.get("uidmap", "")), _ranges(options.get("gidmap", "")))


def _ranges(text: str) -> Ranges:
    found = []
    for each in text.split(","):
        match = _RANGE.match(each)
        if match is None:
            raise InvalidArgument(f"{each[:80]!r} is not containerID:hostID:size")
        found.append((int(match[1]), int(match[2]), int(match[3])))
    return tuple(found)


def _inside(ranges: Ranges, number: int) -> int:
    for inside, outside, size in ranges:
        if outside <= number < outside + size:
            return inside + number - outside
    return OVERFLOW
