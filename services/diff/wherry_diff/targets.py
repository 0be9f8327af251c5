"""From a snapshot's mounts to the directory that a layer is extracted into. Nothing is mounted for it."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared.errors import Unimplemented
from wherry_shared.values import Mount

from .extract import Target


def of(mounts: Sequence[Mount], *, standalone: bool) -> Target:
    """The upper directory of one overlay mount, or the source of one bind mount.

    Unimplemented: anything else would have to be mounted.
    """
    if len(mounts) != 1:
        raise Unimplemented(f"a layer is applied to one mount, not to {len(mounts)}")
    mount = mounts[0]
    options = dict(option.partition("=")[::2] for option in mount.options)
    if mount.type == "overlay" and "upperdir" in options:
        parents = tuple(d for d in options.get("lowerdir", "").split(":") if d)
        return Target(options["upperdir"], overlay=True, parents=() if standalone else parents, standalone=standalone)
    if mount.type == "bind" and "ro" not in mount.options:
        return Target(mount.source, overlay=False, standalone=standalone)
    raise Unimplemented(f"a layer cannot be applied to a mount of type {mount.type!r}")
