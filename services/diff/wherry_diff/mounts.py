"""Looks at what a snapshot's mounts show, and leaves no mount behind.

One bind mount is its source. Anything else is mounted by a thread in a mount namespace of its own, which opens the root
and ends: the namespace goes with it, and the mount lives on without a place until the descriptor is closed. So nothing
appears on the host, nothing is left by a crash, and no other process's unmount is held up.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from wherry_shared.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unimplemented,
    WherryError,
)
from wherry_shared.values import Mount

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE, _MS_BIND, _MS_REMOUNT, _MS_RDONLY = 1 << 14, 1 << 18, 1 << 12, 1 << 5, 1
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 2, 4, 8, 1 << 10
_FLAGS = {
    "ro": _MS_RDONLY, "nosuid": _MS_NOSUID, "nodev": _MS_NODEV, "noexec": _MS_NOEXEC, "noatime": _MS_NOATIME,
    "bind": _MS_BIND, "rbind": _MS_BIND | _MS_REC, "rw": 0, "defaults": 0, "loop": 0,
}  # fmt: skip
_PAGE = 4096
_MAX_MOUNTS = 256
READ_ONLY_TYPES = frozenset({"erofs", "squashfs", "iso9660"})
_FORMAT = "format/"
_OVERLAY = re.compile(r"\{\{ overlay ([0-9]{1,4}) ([0-9]{1,4}) \}\}")

Layer = str | Mount
"""A directory, or the mount of an image that holds one."""

_libc = ctypes.CDLL(None, use_errno=True)

_REASONS: dict[int, type[WherryError]] = {
    errno.ENOENT: NotFound, errno.ENOTDIR: NotFound, errno.ENXIO: NotFound, errno.ENOTBLK: NotFound,
    errno.ENODEV: Unimplemented, errno.EINVAL: InvalidArgument,
    errno.EPERM: PermissionDenied, errno.EACCES: PermissionDenied,
}  # fmt: skip


def options(mount: Mount) -> dict[str, str]:
    """A mount's options, `key=value` or bare."""
    return dict(option.partition("=")[::2] for option in mount.options)


def layers(mounts: Sequence[Mount]) -> list[Layer] | None:
    """What the mounts lay over each other, topmost first: directories, and images that have to be mounted for it.

    One overlay or bind mount, one image, or images and a `format/overlay` on them. None for other mounts.
    """
    if not mounts:
        return None
    last, below = mounts[-1], mounts[:-1]
    if last.type == "bind" and not below:
        return [last.source]
    if last.type in READ_ONLY_TYPES and not below:
        return [last]
    if kind_of(last) != "overlay" or any(mount.type not in READ_ONLY_TYPES for mount in below):
        return None
    given = options(last)
    found: list[Layer] = [given["upperdir"]] if "upperdir" in given else []
    match = _OVERLAY.fullmatch(given.get("lowerdir", ""))
    if match is None:
        return None if below else found + [d for d in given.get("lowerdir", "").split(":") if d]
    return [*found, *(mounts[index] for index in _range(match, len(below)))]


def kind_of(mount: Mount) -> str:
    """The file system of a mount: a type `format/x` is an `x` whose options name mounts before it."""
    return mount.type.removeprefix(_FORMAT)


def _range(match: re.Match[str], count: int) -> range:
    """The mounts that `{{ overlay first last }}` names, in that order. InvalidArgument: there are not so many."""
    first, last = int(match[1]), int(match[2])
    if max(first, last) >= count:
        raise InvalidArgument(f"{match[0]!r} names a mount that is not there")
    return range(first, last + 1) if first <= last else range(first, last - 1, -1)


def read_only(mount: Mount) -> Mount:
    """The mount for somebody who only looks: an overlay's upper directory becomes its topmost lower one.

    A second overlay with an upper directory that is in use would be undefined behaviour.
    """
    given = options(mount)
    if kind_of(mount) != "overlay" or "upperdir" not in given:
        return mount
    kept = [o for o in mount.options if o.partition("=")[0] not in ("upperdir", "workdir", "lowerdir", "index")]
    lower = f"lowerdir={given['upperdir']}:{given.get('lowerdir', '')}"
    return mount.model_copy(update={"options": [*kept, lower]})


@contextmanager
def directories(layers: Sequence[Layer], at: str) -> Iterator[tuple[str, ...]]:
    """A path for each layer: the directory itself, or the root of the image, mounted for the time of the block."""
    with ExitStack() as stack:
        yield tuple(
            layer if isinstance(layer, str) else f"/proc/self/fd/{stack.enter_context(opened([layer], at))}"
            for layer in layers
        )


@contextmanager
def opened(mounts: Sequence[Mount], at: str) -> Iterator[int]:
    """A descriptor of the root directory of what `mounts` show, mounted one over the other as they are given.

    at: any directory; it is covered in the private namespace only. NotFound, FailedPrecondition, Unimplemented
    (the kernel does not know the type), InvalidArgument (options).
    """
    fd = _open(mounts, at)
    try:
        yield fd
    finally:
        os.close(fd)


def _open(mounts: Sequence[Mount], at: str) -> int:
    if not 0 < len(mounts) <= _MAX_MOUNTS:
        raise InvalidArgument(f"{len(mounts)} mounts for one root file system")
    if len(mounts) == 1 and mounts[0].type in ("bind", "rbind") and not mounts[0].target:
        try:
            return os.open(mounts[0].source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _typed(error, mounts[0]) from error
    return _apart(lambda: _mounted(mounts, at))


def _apart(work: Callable[[], int]) -> int:
    """Run `work` in a thread that has a mount namespace and a working directory to itself."""
    found: list[int] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            _call(_libc.unshare(_CLONE_NEWNS))  # means CLONE_FS too
            _call(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))
            found.append(work())
        except BaseException as error:  # not lost: it is raised below
            failed.append(error)

    thread = threading.Thread(target=run, name="wherry-mount")
    thread.start()
    thread.join()
    if failed:
        if isinstance(failed[0], OSError):
            raise FailedPrecondition(f"a private mount namespace: {failed[0].strerror}") from failed[0]
        raise failed[0]
    return found[0]


def _mounted(mounts: Sequence[Mount], at: str) -> int:
    for mount, target in _places(mounts, at):
        try:
            if target != at:
                os.makedirs(target, exist_ok=True)
            _mount(mount, target)
        except OSError as error:
            raise _typed(error, mount) from error
    return os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _places(mounts: Sequence[Mount], at: str) -> list[tuple[Mount, str]]:
    """Each mount and where it goes: on `at` or below it, unless the last one is made of those before it.

    That is told by its type `format/...`, and by `{{ overlay FIRST LAST }}` in its options, for the places of those
    mounts (containerd's form). They lie in a small tmpfs that the last mount covers.
    """
    *first, last = mounts
    if not last.type.startswith(_FORMAT):
        return [(mount, _below(at, mount)) for mount in mounts]
    ground = Mount(type="tmpfs", source="tmpfs", options=["nosuid", "nodev", "noexec", "mode=0700", "size=64k"])
    places = [f"{at}/{number}" for number in range(len(first))]
    return [(ground, at), *zip(first, places, strict=True), (_formatted(last, places), at)]


def _below(at: str, mount: Mount) -> str:
    if ".." in mount.target.split("/"):
        raise InvalidArgument(f"the mount's target {mount.target!r} leads out of the root")
    return f"{at}/{mount.target.strip('/')}".rstrip("/")


def _formatted(mount: Mount, places: Sequence[str]) -> Mount:
    """The mount with those before it in its options, by their places. InvalidArgument: it names them in another way."""

    def named(match: re.Match[str]) -> str:
        return ":".join(places[index] for index in _range(match, len(places)))

    made = [_OVERLAY.sub(named, option) for option in mount.options]
    if any("{{" in option for option in made):
        raise InvalidArgument(f"the options of the {mount.type} mount have a form that is not known")
    return mount.model_copy(update={"type": kind_of(mount), "options": made})


def _mount(mount: Mount, target: str) -> None:
    flags, data = 0, []
    for option in mount.options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        else:
            data.append(option)
    if mount.type == "overlay" and len(",".join(data)) >= _PAGE - 1:
        data = _shortened(data)
    text = os.fsencode(",".join(data))
    if len(text) >= _PAGE:
        raise InvalidArgument(
            f"the options of the {mount.type} mount have {len(text)} bytes, and a page is all they may"
        )
    _call(
        _libc.mount(
            os.fsencode(mount.source or mount.type), os.fsencode(target), mount.type.encode(), ctypes.c_ulong(flags),
            text,
        )
    )  # fmt: skip
    if flags & _MS_BIND and flags & ~(_MS_BIND | _MS_REC):
        # The first call binds and ignores the other flags.
        again = ctypes.c_ulong(flags & ~_MS_REC | _MS_REMOUNT)
        _call(_libc.mount(None, os.fsencode(target), None, again, None))


def _shortened(data: list[str]) -> list[str]:
    """Overlay's options with its lower directories named from the one that they share, which the thread goes to."""
    lower = next((o.partition("=")[2].split(":") for o in data if o.startswith("lowerdir=")), [])
    if not lower:
        return data
    base = os.path.commonpath(lower)
    os.chdir(base)
    return [o for o in data if not o.startswith("lowerdir=")] + [
        "lowerdir=" + ":".join(os.path.relpath(layer, base) for layer in lower)
    ]


def _call(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _typed(error: OSError, mount: Mount) -> WherryError:
    kind = _REASONS.get(error.errno or 0, FailedPrecondition)
    return kind(f"the {mount.type} mount of {mount.source} cannot be made: {error.strerror}")
