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
    last = _writable(mounts)
    options = looking.options(last)
    layers = looking.layers(mounts)
    if last.type == "bind" and len(mounts) == 1:
        yield Target(last.source, overlay=False, standalone=standalone)
    elif layers is not None and "userxattr" not in options:  # with it overlayfs writes its marks in another way
        with looking.directories([] if standalone else layers[1:], at) as parents:
            yield Target(options["upperdir"], overlay=True, parents=parents, standalone=standalone)
    else:
        with looking.opened(mounts, at) as fd:
            yield Target(f"/proc/self/fd/{fd}", overlay=False)


def _writable(mounts: Sequence[Mount]) -> Mount:
    """The mount that takes what is written. Unimplemented: none does."""
    if not mounts:
        raise Unimplemented("a layer is applied to mounts, and there are none")
    last = mounts[-1]
    options = looking.options(last)
    if "ro" in options or last.type in looking.READ_ONLY_TYPES:
        raise Unimplemented(f"a layer cannot be applied to a read-only mount of type {last.type!r}")
    if looking.kind_of(last) == "overlay" and "upperdir" not in options:
        raise Unimplemented("a layer cannot be applied to an overlay without an upper directory")
    if ids.OPTIONS & options.keys():
        raise Unimplemented("a layer cannot be applied to a mount with id mappings")
    return last
