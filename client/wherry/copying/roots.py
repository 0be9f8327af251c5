"""The root of a container, or of this host, as a descriptor under which paths are looked up."""

from __future__ import annotations

import ctypes
import os
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wherry_shared.errors import FailedPrecondition, NotFound, Unimplemented
from wherry_shared.openat2 import IN_ROOT, NO_MAGICLINKS, openat2
from wherry_shared.values import Mount

from .. import nearby
from .owners import PLAIN, Ids

if TYPE_CHECKING:
    from ..container import Container

_PAGE = 4096
_MS_RDONLY, _MS_BIND, _MS_REC, _MS_REMOUNT, _MS_PRIVATE = 1, 4096, 16384, 32, 1 << 18
_CLONE_NEWNS = 0x00020000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Found:
    """Something that a path led to, held by a descriptor (O_PATH)."""

    fd: int
    info: os.stat_result

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.info.st_mode)


class Tree:
    """A root directory; paths are resolved as if it were `/`, whatever links say. Close it, or use `with`."""

    def __init__(self, fd: int, ids: Ids = PLAIN) -> None:
        self.fd = fd
        self.ids = ids

    @classmethod
    def of_host(cls) -> Tree:
        """The whole of this host, as this process sees it."""
        return cls(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    @contextmanager
    def open(self, path: str, *, follow: bool) -> Iterator[Found]:
        """What is at a path; follow: if that is a link, what it leads to. FileNotFoundError and its kin."""
        flags = os.O_PATH | (0 if follow else os.O_NOFOLLOW)
        fd = openat2(self.fd, path.lstrip("/") or ".", flags, IN_ROOT | NO_MAGICLINKS)
        try:
            yield Found(fd, os.fstat(fd))
        finally:
            os.close(fd)

    def kind(self, path: str) -> str:
        """`directory`, `file` or "" for what a path leads to."""
        try:
            with self.open(path, follow=True) as found:
                return "directory" if found.is_directory else "file"
        except (FileNotFoundError, NotADirectoryError):
            return ""


async def container_root(container: Container, *, writable: bool) -> Tree:
    """The root of a container: through its process while it has one, else its snapshot, mounted where nobody sees it.

    Unimplemented: from afar, to be written with mapped ids while it does not run, or mounts of several parts.
    FailedPrecondition: it has no snapshot.
    """
    nearby.require(container.client, "copying files")
    ids = Ids.of(container.record.spec or {})
    for _ in range(3):
        pid = await _pid(container)
        if not pid:
            break
        try:
            process = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            # What was opened is the container's process if that still runs now: a number is given anew only after.
            if await _pid(container) == pid:
                return Tree(os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=process), ids)
        except (FileNotFoundError, ProcessLookupError):
            continue
        finally:
            os.close(process)
    mounts = await container.mounts()
    if not mounts:
        raise FailedPrecondition(f"container {container.id} has no snapshot and does not run")
    if ids.mapped and writable:
        # Mounted without the mapping, what is copied up from a layer would be nobody's in the container.
        raise Unimplemented(f"container {container.id} has mapped ids: nothing is copied into it while it does not run")
    return Tree(_mounted(mounts, writable=writable), ids)


async def _pid(container: Container) -> int:
    try:
        state = await container.client.tasks.get(container.id)
    except NotFound:
        return 0
    return state.pid if state.status in ("created", "running", "paused", "pausing") else 0


def _mounted(mounts: Sequence[Mount], *, writable: bool) -> int:
    """A descriptor of a snapshot's root, mounted in a namespace of a thread of its own, which ends with the thread;
    the mount lives as long as the descriptor."""
    if len(mounts) != 1 or mounts[0].type.startswith("format/") or mounts[0].target:
        raise Unimplemented(f"a snapshot of {len(mounts)} mounts cannot be copied while its container does not run")
    opened: list[int] = []
    failed: list[OSError] = []

    def work() -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="wherry-cp-") as place:
                _check(_libc.unshare(_CLONE_NEWNS), "unshare")
                _mount("none", "/", "", _MS_REC | _MS_PRIVATE, "")
                _mount_at(place, mounts[0], writable=writable)
                opened.append(os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
                _check(_libc.umount2(place.encode(), 2), "umount")  # MNT_DETACH: only the descriptor keeps it
        except OSError as e:
            failed.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return opened[0]


def _mount_at(place: str, mount: Mount, *, writable: bool) -> None:
    flags = 0 if writable and "ro" not in mount.options else _MS_RDONLY
    if mount.type != "overlay":
        _mount(mount.source, place, mount.type, _MS_BIND | _MS_REC, "")
        if flags:
            _mount("none", place, "", _MS_BIND | _MS_REMOUNT | flags, "")
        return
    options = {key: value for key, _, value in (o.partition("=") for o in mount.options)}
    layers = options.pop("lowerdir", "").split(":")
    options = {k: v for k, v in options.items() if k not in ("ro", "rw", "uidmap", "gidmap")}
    if flags:
        # Read only, the topmost layer is one more of the lower ones: nothing is written beside it.
        layers = [layer for layer in (options.pop("upperdir", ""), *layers) if layer]
        options = {k: v for k, v in options.items() if k != "workdir"}
        if len(layers) == 1:
            _mount(layers[0], place, "", _MS_BIND, "")
            _mount("none", place, "", _MS_BIND | _MS_REMOUNT | _MS_RDONLY, "")
            return
    base = os.path.commonpath(layers)
    os.chdir(base)  # this thread's own, and its alone
    short = ":".join(os.path.relpath(layer, base) for layer in layers)
    words = [f"lowerdir={short}", *(f"{k}={v}" if v else k for k, v in options.items())]
    if len(",".join(words)) >= _PAGE:
        raise OSError(7, "the snapshot has too many layers to be mounted here")
    _mount("overlay", place, "overlay", flags, ",".join(words))


def _mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        os.fsencode(data) or None,
    )
    _check(result, f"mount of {kind or source}")


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
