"""Whose files are whose: numbers in a container with mapped ids, and what they are on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wherry_shared.errors import FailedPrecondition

Ranges = tuple[tuple[int, int, int], ...]
"""The first number inside, the first on the host, and how many."""


@dataclass(frozen=True)
class Ids:
    """The mappings of a container; none: the numbers are the same."""

    uids: Ranges = ()
    gids: Ranges = ()

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Ids:
        """Those of an OCI specification."""
        linux = spec.get("linux") or {}
        return cls(_ranges(linux.get("uidMappings")), _ranges(linux.get("gidMappings")))

    @property
    def mapped(self) -> bool:
        return bool(self.uids or self.gids)

    def inside(self, uid: int, gid: int) -> tuple[int, int]:
        """What the host's numbers are in the container; one that is nobody's there stays as it is."""
        return _turned(self.uids, uid, 1, 0, uid), _turned(self.gids, gid, 1, 0, gid)

    def on_host(self, uid: int, gid: int) -> tuple[int, int]:
        """What the container's numbers are on the host. FailedPrecondition: it has no such number."""
        found = _turned(self.uids, uid, 0, 1, -1), _turned(self.gids, gid, 0, 1, -1)
        if -1 in found:
            raise FailedPrecondition(f"the container has no owner {uid}:{gid}: its ids are mapped")
        return found


PLAIN = Ids()


def _ranges(mappings: Any) -> Ranges:
    return tuple((int(m["containerID"]), int(m["hostID"]), int(m["size"])) for m in mappings or ())


def _turned(ranges: Ranges, number: int, here: int, there: int, otherwise: int) -> int:
    if not ranges:
        return number
    for each in ranges:
        if each[here] <= number < each[here] + each[2]:
            return number - each[here] + each[there]
    return otherwise
