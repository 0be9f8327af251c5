"""From a snapshot's mounts to the directory that a layer is extracted into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from wherry_shared.errors import Unimplemented
from wherry_shared.values import Mount

from . import ids
from . import mounts as looking
from .extract import Target


@contextmanager
def opened(mounts: Sequence[Mount], at: str, *, standalone: bool) -> Iterator[Target]:
    """Where the layer goes: an overlay's upper directory, the source of a bind mount, or a mount made for it.

    The last is nobody else's (`mounts.opened`, at the directory `at`), and the layer's whiteouts are carried out in it.
    Unimplemented: read-only mounts, or a file system that the kernel does not know.
    """
    found = _directory(mounts, standalone=standalone)
    if found is not None:
        yield found
        return
    with looking.opened(mounts, at) as fd:
        yield Target(f"/proc/self/fd/{fd}", overlay=False)


def _directory(mounts: Sequence[Mount], *, standalone: bool) -> Target | None:
    """The directory that one mount stands for; none if it has to be mounted."""
    if not mounts:
        raise Unimplemented("a layer is applied to mounts, and there are none")
    last = mounts[-1]
    options = looking.options(last)
    if "ro" in options or last.type in looking.READ_ONLY_TYPES:
        raise Unimplemented(f"a layer cannot be applied to a read-only mount of type {last.type!r}")
    if last.type in ("overlay", "format/overlay") and "upperdir" not in options:
        raise Unimplemented("a layer cannot be applied to an overlay without an upper directory")
    if ids.OPTIONS & options.keys():
        raise Unimplemented("a layer cannot be applied to a mount with id mappings")
    if len(mounts) > 1:
        return None
    if last.type == "bind":
        return Target(last.source, overlay=False, standalone=standalone)
    if last.type == "overlay" and "userxattr" not in options:  # with it overlayfs writes its marks in another way
        parents = tuple(d for d in options.get("lowerdir", "").split(":") if d)
        return Target(options["upperdir"], overlay=True, parents=() if standalone else parents, standalone=standalone)
    return None
