"""Overlays whose layers show their files under other owners: options `uidmap=` and `gidmap=` (`container:host:size`).

The directory that all layers share is mounted once more with mapped ids (mount_setattr(2), MOUNT_ATTR_IDMAP; overlay
takes such layers from Linux 5.19 on), and the overlay is mounted on that. It keeps copies of the mounts that it needs,
so the place is taken away again before the container is made: nothing in it can come to see other snapshots.
"""

from __future__ import annotations

import os

from wherry_task.monitor import libc, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PLACE = "layers"  # beside the mount's target, in the bundle
_OPTIONS = ("uidmap", "gidmap")


def mapping(data: Sequence[str]) -> tuple[str, str] | None:
    """What an overlay's options ask for, as /proc/PID/{uid,gid}_map want it. Raises Failure when it is malformed."""
    given = {key: value for key, _, value in (option.partition("=") for option in data) if key in _OPTIONS}
    if not given:
        return None
    return _lines(given.get("uidmap", "")), _lines(given.get("gidmap", ""))


def _lines(text: str) -> str:
    lines = []
    for each in text.split(","):
        numbers = each.split(":")
        if len(numbers) != 3 or not all(number.isdigit() and number.isascii() for number in numbers):
            raise wire.Failure(wire.INVALID, f"{each[:80]!r} is not containerID:hostID:size")
        lines.append(" ".join(numbers))
    return "\n".join(lines)


def mounted(target: str, data: Sequence[str], maps: tuple[str, str], mount: Callable[[list[str]], None]) -> None:
    """Call `mount` with the overlay's options, its layers named where their ids are mapped."""
    layers = next((option[9:].split(":") for option in data if option.startswith("lowerdir=")), [])
    if not layers:
        raise wire.Failure(wire.INVALID, "an overlay with mapped ids has no layers")
    base, place = os.path.commonpath(layers), os.path.join(os.path.dirname(target), _PLACE)
    os.makedirs(place, 0o700, exist_ok=True)
    namespace = libc.user_namespace(*maps)
    try:
        libc.mount_mapped(base, place, namespace)
    finally:
        os.close(namespace)
    try:
        there = [os.path.normpath(os.path.join(place, os.path.relpath(layer, base))) for layer in layers]
        rest = [option for option in data if option.partition("=")[0] not in (*_OPTIONS, "lowerdir")]
        mount([*rest, "lowerdir=" + ":".join(there)])
    finally:
        libc.unmount(place, libc.MNT_DETACH | libc.UMOUNT_NOFOLLOW)
        os.rmdir(place)
