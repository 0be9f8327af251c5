"""Trees that containers wrote, made into EROFS images by mkfs.erofs of erofs-utils.

mkfs.erofs goes by paths, and whoever still has the tree mounted could put a link where a directory was. So it looks at
the tree through a bind mount that follows no links, in a mount namespace of one thread, which ends with it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from wherry_shared.errors import FailedPrecondition, Internal, ResourceExhausted

from . import Check, trees
from .directories import has_filesystem

_PROGRAM = "mkfs.erofs"
_POLL = 0.05
_WORDS = 2000
_LITTLE = 1 << 20
_CLONE_NEWNS = 0x00020000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_NOSYMFOLLOW, _MS_BIND = 1, 2, 4, 32, 256, 4096
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_SYS_FSOPEN, _SYS_FSCONFIG = 430, 431  # the same on every architecture
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def check_host(scratch: Path) -> None:
    """FailedPrecondition where this host cannot make such images, or cannot mount them from a file; it is tried."""
    if shutil.which(_PROGRAM) is None:
        raise FailedPrecondition(f"{_PROGRAM} is not installed (Debian: erofs-utils)")
    if not has_filesystem("erofs"):
        raise FailedPrecondition("the kernel has no erofs (it is not in /proc/filesystems)")
    tree, image = scratch / "probe", scratch / "probe.erofs"
    tree.mkdir(exist_ok=True, mode=0o700)
    try:
        make_image(str(tree), str(image), lambda: None)
        _create(os.fsencode(image))
    except OSError as e:
        raise FailedPrecondition(f"the kernel does not mount an erofs from a file (Linux 6.12 does): {e}") from e
    finally:
        image.unlink(missing_ok=True)
        tree.rmdir()


def _create(image: bytes) -> None:
    """Have the kernel make a file system of the image, up to the point where it would be mounted somewhere."""
    context = _called(_libc.syscall(ctypes.c_long(_SYS_FSOPEN), b"erofs", ctypes.c_uint(1)))
    try:
        for command, key, value in ((_SET_STRING, b"source", image), (_SET_FLAG, b"ro", None), (_CREATE, None, None)):
            number, fd = ctypes.c_long(_SYS_FSCONFIG), ctypes.c_int(context)
            _called(_libc.syscall(number, fd, ctypes.c_uint(command), key, value, ctypes.c_int(0)))
    finally:
        os.close(context)


def make_image(tree: str, image: str, check: Check) -> None:
    """Make the file `image` of a tree: whole when this returns, absent when it raises.

    ResourceExhausted: no space for it. Internal: mkfs.erofs cannot make it, in its words.
    """
    # Without chunks a hole is written out; with them, the smallest file takes a block.
    chunks = ["--chunksize=4096"] if trees.has_holes(tree, check) else []
    command = [_PROGRAM, "--quiet", *chunks, image, tree]
    try:
        _apart(lambda: _run(tree, command, check))
    except BaseException:
        Path(image).unlink(missing_ok=True)
        raise


def _run(tree: str, command: list[str], check: Check) -> None:
    _mount(None, "/", _MS_REC | _MS_PRIVATE)
    _mount(tree, tree, _MS_BIND)
    _mount(None, tree, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOSYMFOLLOW)
    with TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            while process.poll() is None:
                check()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        words = said.read(_WORDS).decode(errors="replace").strip()
    if process.returncode:
        error = ResourceExhausted if _is_full(command[-2], words) else Internal
        raise error(f"{_PROGRAM} of {tree} ended with {process.returncode}: {words or 'nothing said'}")


def _is_full(image: str, words: str) -> bool:
    room = os.statvfs(os.path.dirname(image))
    return os.strerror(errno.ENOSPC) in words or not room.f_favail or room.f_bavail * room.f_frsize < _LITTLE


def _apart(work: Callable[[], None]) -> None:
    """Run `work` in a thread with a mount namespace to itself, which its children share."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            _called(_libc.unshare(_CLONE_NEWNS))
            work()
        except BaseException as e:  # not lost: it is raised below
            failed.append(e)

    thread = threading.Thread(target=run, name="snapshot-mkfs")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _mount(source: str | None, target: str, flags: int) -> None:
    what = None if source is None else os.fsencode(source)
    _called(_libc.mount(what, os.fsencode(target), None, ctypes.c_ulong(flags), None))


def _called(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
