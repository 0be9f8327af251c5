"""Compares two trees in one pass: walk, archive, hash and compress; or tells the changes, a page at a time."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from wherry_shared.errors import DeadlineExceeded, Unimplemented
from wherry_shared.values import Mount

from . import ids
from . import mounts as looking
from .ahead import Ahead
from .archive import Archive, changed, kind_of
from .changes import Layer, Redirected, Trees, Walk
from .compress import compressor
from .limits import DEFAULT, Limits
from .mounts import layers, options, read_only
from .parents import Parents

_AHEAD = 16  # pieces of 256 KiB that may wait between the two threads
_PER_PAGE_BYTES = 384 << 10  # of paths, so that an answer stays under the bus's bound


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is asked: the mounts of the left tree (none: an empty one) and of the right.

    at: a directory to mount on, privately. deadline: unix time in seconds, 0 for none. epoch: see `Archive`.
    """

    left: tuple[Mount, ...]
    right: tuple[Mount, ...]
    media_type: str
    at: str
    epoch: int | None = None
    deadline: float = 0.0
    limits: Limits = DEFAULT

    def check(self) -> None:
        """DeadlineExceeded when it is over."""
        if self.deadline and time.time() > self.deadline:
            raise DeadlineExceeded("the comparison was not done by its deadline")


@dataclass(frozen=True, slots=True)
class Compared:
    """What was written: digests and sizes in bytes of the compressed stream and of the archive in it."""

    digest: str
    size: int
    diff_id: str
    archive_size: int


@dataclass(frozen=True, slots=True)
class Redo:
    """The upper directory alone did not do, after bytes were written: start over with the whole trees."""


def compare(job: Comparison, write: Callable[[bytes], None], *, whole: bool = False) -> Compared | Redo:
    """Write the layer that makes the left tree the right one; blocks.

    Looks at an overlay's upper directory alone where that says it all, unless `whole`. Raises what `Archive` and
    `mounts.opened` do, Unimplemented (media type), DeadlineExceeded, and what `write` raises.
    """
    form = compressor(job.media_type)
    archive_hash, hash_ = hashlib.sha256(), hashlib.sha256()
    archive_size = size = 0

    def put(data: bytes) -> None:
        nonlocal size
        if data:
            hash_.update(data)
            size += len(data)
            write(data)

    with ExitStack() as stack:
        archive = Archive(_walk(job, stack, whole=whole), job.limits, job.epoch, ids.of(options(job.right[-1])))
        try:
            for piece in stack.enter_context(Ahead(archive, _AHEAD)):
                job.check()
                archive_hash.update(piece)
                archive_size += len(piece)
                put(form.compress(piece))
        except Redirected:
            return Redo()
        put(form.flush())
    return Compared(f"sha256:{hash_.hexdigest()}", size, f"sha256:{archive_hash.hexdigest()}", archive_size)


def changes(job: Comparison, after: bytes, limit: int) -> tuple[list[tuple[str, bytes]], bytes]:
    """Changes behind the path `after`, as (A, C or D; path), and the path to go on after (none: that was all)."""
    try:
        return _page(job, after, limit, whole=False)
    except Redirected:
        return _page(job, after, limit, whole=True)


def _page(job: Comparison, after: bytes, limit: int, *, whole: bool) -> tuple[list[tuple[str, bytes]], bytes]:
    with ExitStack() as stack:
        walk = _walk(job, stack, after, whole=whole)
        found: list[tuple[str, bytes]] = []
        size = 0
        for each in filter(changed, walk):
            if len(found) >= limit or size + len(each.path) > _PER_PAGE_BYTES:
                return found, found[-1][1]
            found.append((kind_of(each, walk), each.path))
            size += len(each.path) + 16
        return found, b""


def _walk(job: Comparison, stack: ExitStack, after: bytes = b"", *, whole: bool) -> Walk:
    right, left = job.right, job.left
    walk: Walk
    if not whole and (found := upper_alone(left, right)) is not None:
        upper, lower = found
        parents = Parents(stack.enter_context(looking.directories(lower, job.at)))
        stack.callback(parents.close)
        top = Mount(type="bind", source=upper) if isinstance(upper, str) else upper
        walk = Layer(stack.enter_context(looking.opened([top], job.at)), parents, job.limits, job.check, after)
    else:
        if any(ids.OPTIONS & options(mount).keys() for mount in (*left, *right)):
            raise Unimplemented("trees with id mappings are compared by the right one's upper directory alone")
        one = stack.enter_context(looking.opened([read_only(m) for m in left], job.at)) if left else None
        other = stack.enter_context(looking.opened([read_only(m) for m in right], job.at))
        walk = Trees(one, other, job.limits, job.check, after)
    stack.callback(walk.close)
    return walk


def upper_alone(
    left: Sequence[Mount], right: Sequence[Mount]
) -> tuple[looking.Layer, list[looking.Layer]] | None:  # fmt: skip
    """The upper directory of the right and its parents, if these are the left tree: all changes are in that one.

    Either is an active overlay, or both are views of committed snapshots, one the parent of the other. None where
    more than the directories themselves has a say: overlay's index, its xattrs in the user's name.
    """
    above, below = layers(right), layers(left)
    if above is None or below is None or looking.kind_of(right[-1]) != "overlay" or above[1:] != below:
        return None
    given = options(right[-1])
    if "userxattr" in given or "userxattr" in options(left[-1]):
        return None
    if "upperdir" in given and os.path.exists(f"{given.get('workdir', '')}/index"):
        return None
    return above[0], above[1:]
